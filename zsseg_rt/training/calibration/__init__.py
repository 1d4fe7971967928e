"""Choose how much cosines count beside masks, and the seen bias, without any unseen label."""
