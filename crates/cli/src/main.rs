//! `virtward`: the command line of Virtward.

mod app;
mod cli;
mod commands;
mod config;
mod connect;
mod daemon;
mod exit;
mod failures;
mod health_config;
mod notify_config;
mod out;
mod progress;
mod render;
mod secret;
mod view;

fn main() -> std::process::ExitCode {
    app::main()
}
