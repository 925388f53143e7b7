//! Specs as a whole.
