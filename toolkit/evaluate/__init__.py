"""This package measures the quality of models on texts and tasks."""
