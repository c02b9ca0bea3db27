//! Looking into a pass: running tokens while a watch looks on, and saving what it sees.

pub mod file;
pub mod pass;
pub mod save;
