"""What runs the encoder and heads on a device."""
