"""Predictions of published training runs: models, forced plans, pricing options, scores."""
