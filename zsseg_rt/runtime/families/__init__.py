"""The way from a preprocessed image to class logits, one file per family."""
