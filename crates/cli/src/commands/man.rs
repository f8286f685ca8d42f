//! `virtward man`: manual pages, one per command, generated from the grammar so that they cannot drift from it.

use std::{fs, path::PathBuf};

use clap::CommandFactory;

use crate::{
    cli::Cli,
    exit::{Failure, Kind},
    out,
};

/// Arguments of `man`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  virtward man | man -l -                        read the page of virtward itself
  virtward man backup run | man -l -             read the page of one command
  virtward man --dir /usr/local/share/man/man1   write the pages of all commands")]
pub struct Args {
    /// Command whose page to print, for example: backup run
    #[arg(value_name = "COMMAND", conflicts_with = "dir")]
    pub path: Vec<String>,
    /// Write every page into this directory instead, creating it if needed
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// Prints one page or writes them all.
pub fn run(args: &Args) -> Result<(), Failure> {
    let mut root = Cli::command();
    root.build();
    match &args.dir {
        None => out::bytes(&page(&find(&root, &args.path)?)?),
        Some(dir) => {
            fs::create_dir_all(dir).map_err(Failure::io(format!("cannot create {}", dir.display())))?;
            let mut pages = Vec::new();
            collect(&root, "virtward", &mut pages);
            for (name, command) in pages {
                let file = dir.join(format!("{name}.1"));
                fs::write(&file, page(&command)?).map_err(Failure::io(format!("cannot write {}", file.display())))?;
            }
            Ok(())
        }
    }
}

fn find(root: &clap::Command, path: &[String]) -> Result<clap::Command, Failure> {
    let mut name = "virtward".to_owned();
    let mut command = root;
    for word in path {
        command = command.find_subcommand(word).ok_or_else(|| {
            Failure::new(Kind::Usage, format!("there is no command {:?} under {name:?}", word))
                .hint("virtward --help lists the commands")
        })?;
        name = format!("{name}-{word}");
    }
    Ok(titled(command, &name))
}

/// Every visible command with its page name, parents before children.
fn collect(command: &clap::Command, name: &str, pages: &mut Vec<(String, clap::Command)>) {
    pages.push((name.to_owned(), titled(command, name)));
    for child in command.get_subcommands().filter(|child| !child.is_hide_set()) {
        collect(child, &format!("{name}-{}", child.get_name()), pages);
    }
}

fn titled(command: &clap::Command, name: &str) -> clap::Command {
    command.clone().display_name(name.to_owned())
}

fn page(command: &clap::Command) -> Result<Vec<u8>, Failure> {
    let mut text = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut text).map_err(Failure::io("cannot render the manual page"))?;
    Ok(text)
}
