"""Backbone and detector, timed with each of their optimisations off and on."""
