"""What tests share: tiny models, fakes, graphs."""
