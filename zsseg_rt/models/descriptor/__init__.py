"""ZegCLIP and CLIP-RC, whose class queries are relationship descriptors."""
