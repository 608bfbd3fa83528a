"""Initial values of factors."""
