//! A whole API server on a loopback port, asked by in-process clients and by kubectl.

mod api;
mod bounds;
mod certificates;
mod fixture;
mod kinds;
mod kubectl;
mod pods;
mod streams;
