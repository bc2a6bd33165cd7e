"""Metrics of texts and predictions. Each gives a value per example, so that two methods can be compared in pairs."""
