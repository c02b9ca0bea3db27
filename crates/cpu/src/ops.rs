//! The ops of a forward pass that are more than one loop over rows.

pub mod attention;
pub mod best;
pub mod experts;
pub mod route;
