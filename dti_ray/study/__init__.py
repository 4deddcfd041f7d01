"""A study of quality and cost: ways of training, each with several seeds, held against each other and the classics."""
