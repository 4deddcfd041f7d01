"""A trained model behind HTTP: requests are checked at a door, scored in batches, and answered by one state each."""
