//! `virtward hook qemu`: libvirt's question before it starts a VM.
//!
//! Called by the hook that `ha enable` installs, as root, while libvirt waits. Reads files only.

use std::{
    io::{self, Read},
    path::PathBuf,
};

use virtward_engine::ha::hook::{Hook, XML_BYTES};

use crate::exit::{Failure, Kind};

/// The kinds of hooks.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// May this VM start here? Exit status 0 is yes; the reason for a no is on standard error
    #[command(after_help = "Called by /etc/libvirt/hooks/qemu.d/50-virtward, with the domain's XML on standard input.")]
    Qemu(Qemu),
}

/// Arguments of `hook qemu`.
#[derive(Debug, clap::Args)]
pub struct Qemu {
    /// Directory of high availability's state
    #[arg(long, value_name = "DIR", default_value = "/var/lib/virtward/ha")]
    pub state: PathBuf,
    /// The VM's name
    pub vm: String,
    /// What libvirt is about to do: prepare, start, migrate, ...
    pub operation: String,
    /// What else libvirt says
    #[arg(hide = true, allow_hyphen_values = true)]
    pub rest: Vec<String>,
}

/// Answers.
pub fn run(command: &Command) -> Result<(), Failure> {
    let Command::Qemu(args) = command;
    let xml = || {
        let mut text = Vec::new();
        // What cannot be read is judged by the VM's name.
        let _ = io::stdin().lock().take(XML_BYTES).read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    };
    Hook::new(&args.state).judge(&args.vm, &args.operation, xml).map_err(|why| Failure::new(Kind::Refused, why))
}
