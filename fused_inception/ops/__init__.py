"""The operators: schema, fake, autograd, autocast and implementations, one file an op family."""
