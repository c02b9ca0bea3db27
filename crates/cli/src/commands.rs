//! One file per command: its arguments and what it does with them.

pub mod bench;
pub mod devices;
pub mod diff;
pub mod inspect;
pub mod replay;
pub mod run;
pub mod serve;
pub mod tokenize;
pub mod trace;
pub mod verify;
