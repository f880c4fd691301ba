//! Functions of neural networks that have a backward pass.
