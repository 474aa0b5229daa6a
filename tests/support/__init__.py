"""What several test folders share: capturing PyTorch functions, running passes stage by stage, comparing with eager."""
