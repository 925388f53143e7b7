//! A whole API server on a loopback port, asked by in-process clients and by kubectl.

mod api;
mod fixture;
mod kubectl;
mod streams;
