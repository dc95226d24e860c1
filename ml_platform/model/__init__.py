"""The way of a model: configuration, evaluation, promotion, registry."""
