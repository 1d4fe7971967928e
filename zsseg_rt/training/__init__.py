"""Train and evaluate the models in torch; nothing of the runtime imports this package."""
