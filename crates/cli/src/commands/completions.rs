//! `virtward completions`: a completion script for a shell, from the same grammar that parses the command line.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::{cli::Cli, exit::Failure, out};

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  virtward completions bash > /etc/bash_completion.d/virtward
  virtward completions zsh > ~/.zfunc/_virtward")]
pub struct Args {
    /// The shell
    #[arg(value_enum)]
    pub shell: Shell,
}

/// Prints the script.
pub fn run(args: &Args) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "virtward", &mut script);
    out::bytes(&script)
}
