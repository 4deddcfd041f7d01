"""The model: batch, masks, attention, backbone, loss."""
