//! The daemon as its clients meet it: the real server on a real Unix socket and on HTTPS, over simulated hosts and real
//! repositories and image files.

mod access;
mod browser;
mod cluster;
mod common;
mod etcd;
mod fuzz;
mod health;
mod jobs;
mod lists;
mod notify;
mod operations;
mod policies;
mod schema;
mod stream;
mod trust;
mod walk;
mod web;
