"""Activations that leave the device between forward and backward, or are made again: `blocks.Activations`."""
