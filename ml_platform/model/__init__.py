"""Model lifecycle: configuration, training, evaluation, promotion, registry."""
