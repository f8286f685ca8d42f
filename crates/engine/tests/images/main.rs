//! Image files in, image files out, with real `qemu-img`, `qemu-nbd` and loop devices. Needs root for the latter.

mod bad;
mod cold;
mod common;
mod crash;
mod device;
mod edges;
mod formats;
mod raw;
