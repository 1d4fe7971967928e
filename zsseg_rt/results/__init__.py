"""What a labelled frame is: labels with names, their parts and outlines, pictures of them."""
