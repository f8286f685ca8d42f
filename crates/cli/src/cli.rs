//! The grammar of the command line: global options and the tree of nouns and verbs.
//!
//! Options that also come from the environment or the configuration file are plain `Option`s here; which source wins is
//! decided in `config`. Not here: what a command does (one file per command under `commands`).

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};

use crate::commands::{
    backup, balance, cluster, completions, ha, hook, host, inventory, job, man, notify, policy, repo, restore, serve,
    state, status, storage, thaw_guard, token, upgrade_plan, vm,
};

const EXAMPLES: &str = "\
Examples:
  virtward repo init                       create /var/lib/virtward/repo
  virtward backup run web1                 later runs read only what changed
  virtward backup run --all --json         every VM, one JSON object per VM
  virtward backup list web1                its restore points
  virtward restore vm web1@latest --name web1-r --start
  virtward backup verify --all --mode full prove that every byte is intact

Exit status:
  0 ok                    1 other failure          2 usage
  3 not found             4 refused or exists      5 busy
  6 no hypervisor         7 no usable repository   8 wrong password or key
  9 damaged data found   10 storage full          11 permission denied
 12 some VMs failed      13 given up to protect the guest
130 cancelled";

/// Protects the virtual machines of libvirt hosts: backup and restore, by hand and by policy.
#[derive(Debug, Parser)]
#[command(
    name = "virtward",
    version,
    after_help = EXAMPLES,
    subcommand_required = true,
    arg_required_else_help = true,
    disable_help_subcommand = true
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options that every command takes.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Repository: a directory, or s3://bucket/prefix [env: VIRTWARD_REPO] [default: /var/lib/virtward/repo]
    #[arg(long, global = true, value_name = "LOCATION")]
    pub repo: Option<String>,
    /// libvirt to connect to [env: VIRTWARD_CONNECT] [default: qemu:///system]
    #[arg(long, global = true, value_name = "URI")]
    pub connect: Option<String>,
    /// File whose first line is the repository's password [env: VIRTWARD_PASSWORD_FILE]
    #[arg(long, global = true, value_name = "FILE", conflicts_with = "key_file")]
    pub password_file: Option<PathBuf>,
    /// File with the repository's key [env: VIRTWARD_KEY_FILE] [default: repo.key beside the configuration file]
    #[arg(long, global = true, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Refuse to delete anything in the repository
    #[arg(long, global = true)]
    pub append_only: bool,
    /// Configuration file [env: VIRTWARD_CONFIG] [default: /etc/virtward/config.toml]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print results, and errors, as JSON on standard output
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress and no notes on standard error
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Log what happens to standard error; twice for more
    #[arg(long, short, global = true, action = ArgAction::Count)]
    pub verbose: u8,
}

/// The nouns.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create and look after a backup repository
    #[command(subcommand)]
    Repo(repo::Command),
    /// Back up VMs and disk images; list, verify and delete restore points
    #[command(subcommand)]
    Backup(backup::Command),
    /// Bring back a whole VM or one disk
    #[command(subcommand)]
    Restore(restore::Command),
    /// What the hypervisor runs and whether it is protected; move it
    #[command(subcommand)]
    Vm(vm::Command),
    /// Empty a host, take it into service again, compare CPUs
    #[command(subcommand)]
    Host(host::Command),
    /// Which VMs should run where: plan, move them, ask what would be if
    #[command(subcommand)]
    Balance(balance::Command),
    /// Save what hosts have and what runs on them
    #[command(subcommand)]
    Inventory(inventory::Command),
    /// The order in which all hosts can be serviced, one at a time
    UpgradePlan(upgrade_plan::Args),
    /// Storage pools: their room, and emptying one
    #[command(subcommand)]
    Storage(storage::Command),
    /// Run the daemon of this host: schedules, API, inventory
    Serve(serve::Args),
    /// What the daemon of this host knows, at a glance
    Status(status::Args),
    /// Jobs of the daemon: list, show, watch, cancel
    #[command(subcommand)]
    Job(job::Command),
    /// Policies: what is backed up, when, and what is kept
    #[command(subcommand)]
    Policy(policy::Command),
    /// Tokens for the API over HTTPS
    #[command(subcommand)]
    Token(token::Command),
    /// Several hosts as one: nodes, tokens to join, state
    #[command(subcommand)]
    Cluster(cluster::Command),
    /// Whom the daemon tells of what happens: test, list
    #[command(subcommand)]
    Notify(notify::Command),
    /// The state file of this host: its backups, and the way back to one
    #[command(subcommand)]
    State(state::Command),
    /// High availability: protect VMs, hosts and how well they are protected
    #[command(subcommand)]
    Ha(ha::Command),
    /// Print a completion script for a shell
    Completions(completions::Args),
    /// Print or write the manual pages
    Man(man::Args),
    /// Answers to libvirt's questions
    #[command(subcommand, hide = true)]
    Hook(hook::Command),
    /// Helpers that virtward starts by itself
    #[command(subcommand, hide = true)]
    Internal(Internal),
}

/// Not for people.
#[derive(Debug, Subcommand)]
pub enum Internal {
    /// Thaws a guest's file systems when whoever froze them is gone
    ThawGuard(thaw_guard::Args),
}
