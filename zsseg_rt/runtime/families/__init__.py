"""What happens between a preprocessed image and class logits, one file per family."""
