//! A host's libvirt, through virsh.

use std::{process::Command, time::Duration};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::run::output_of;

/// One libvirt, at a URI.
#[derive(Clone, Debug)]
pub struct Virsh {
    uri: String,
}

impl Virsh {
    /// The libvirt that answers at `uri`.
    pub fn new(uri: String) -> Self {
        Self { uri }
    }

    /// The URI.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Runs one virsh command and returns what it printed.
    pub fn call(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new("virsh");
        // Messages are compared in places, so they must not be translated.
        command.env("LC_ALL", "C").args(["-q", "-c", &self.uri]).args(args);
        output_of(&mut command, None, Duration::from_secs(60))
    }

    /// Asks a guest's agent and returns the answer's `return`.
    pub fn agent(&self, vm: &str, request: &Value, timeout_s: u32) -> Result<Value> {
        let (request, timeout_s) = (request.to_string(), timeout_s.to_string());
        let answer = self.call(&["qemu-agent-command", vm, "--timeout", &timeout_s, &request])?;
        let mut answer: Value =
            serde_json::from_str(&answer).with_context(|| format!("the agent of {vm} does not answer in JSON"))?;
        Ok(answer["return"].take())
    }
}
