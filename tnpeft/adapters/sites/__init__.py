"""What an adapter can be a part of: values of named stacks, and the kinds of weights."""
