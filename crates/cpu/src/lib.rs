//! Backend for CPUs.
