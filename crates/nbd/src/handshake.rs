//! The handshake as a state machine without input or output.
//!
//! ```text
//!                 ┌─ old style: size and flags at once ─────────────────────────────┐
//!   Greeting ─────┤                                                                 ▼
//!      │          └─ newstyle, not fixed ───────────────────────► ExportName ──► Ready
//!      │ fixed newstyle                                               ▲             ▲
//!      ├─► List ──► Listed                                            │ GO unknown  │
//!      └─► Extended ─┬─refused─► Structured ─┬─► Contexts ─► Go ──────┴─── ACK ─────┘
//!                    └─accepted──────────────┘
//! ```
//!
//! Options that a server does not know are done without: extended headers fall back to structured replies, those to
//! simple ones, `NBD_OPT_GO` to `NBD_OPT_EXPORT_NAME`. Encryption (`NBD_OPT_STARTTLS`) would come between Greeting and
//! the first option, as one more state.
//!
//! The peer is not trusted: answers are bounded in length ([`crate::wire`]) and in number; an answer to something that
//! was not asked ends the handshake.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::error::{Error, Result};
use crate::wire::{self, Framing, OptionReply, export_flag, handshake_flag, info, option, option_reply};

/// Most answers that are taken to a single option (a listing has one per export).
const REPLIES_MAX: usize = 65_536;
/// Most contexts that one export may offer.
const CONTEXTS_MAX: usize = 1024;

/// What the handshake is for.
#[derive(Debug, Clone)]
pub enum Goal {
    /// Use an export.
    Export {
        /// Its name; empty for the server's default.
        name: String,
        /// The block-status contexts wanted; those that the server lacks are left out of the result.
        contexts: Vec<String>,
        /// The most capable framing to ask for.
        framing: Framing,
    },
    /// List the server's exports.
    List,
}

/// What the server says of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// `flush` does something.
    pub can_flush: bool,
    /// `trim` is supported.
    pub can_trim: bool,
    /// Zeroes can be written without sending them.
    pub can_write_zeroes: bool,
    /// Single writes can be made durable.
    pub can_fua: bool,
    /// Several connections see each other's writes, and a flush on one covers all.
    pub can_multi_conn: bool,
    /// Smallest unit of requests in bytes, a power of two; 1 if the server does not care.
    pub block_min: u32,
    /// Unit in bytes at which the server is efficient.
    pub block_preferred: u32,
    /// Longest read or write in bytes that the server takes.
    pub block_max: u32,
    /// Replies are structured: holes are not sent as zeroes, contexts are possible.
    pub structured: bool,
    /// Requests and extents may be longer than 4 GiB.
    pub extended: bool,
    /// The contexts that were asked for and are there.
    pub contexts: Vec<String>,
}

/// Result of a handshake for an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiated {
    /// The export.
    pub info: ExportInfo,
    /// Framing of what follows.
    pub framing: Framing,
    /// The server's id of each of `info.contexts`, in the same order.
    pub context_ids: Vec<u32>,
}

/// An export in a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportEntry {
    /// Its name; the empty one is the default export.
    pub name: String,
    /// What the server says about it, often empty.
    pub description: String,
}

/// Where the handshake stands after a step.
#[derive(Debug)]
pub enum Progress {
    /// More bytes from the server are needed.
    More,
    /// The export can be used; what is left of the input belongs to the transmission phase.
    Ready(Negotiated),
    /// The listing is complete.
    Listed(Vec<ExportEntry>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Greeting,
    OldStyle,
    Extended,
    Structured,
    Contexts,
    Go,
    ExportName,
    List,
    Done,
}

/// The client's side of one handshake.
#[derive(Debug)]
pub struct Handshake {
    goal: Goal,
    state: State,
    no_zeroes: bool,
    framing: Framing,
    contexts: Vec<(String, u32)>,
    export: Option<(u64, u16)>,
    blocks: Option<(u32, u32, u32)>,
    listed: Vec<ExportEntry>,
    replies: usize,
}

impl Handshake {
    /// A handshake that has not begun; the server speaks first.
    pub fn new(goal: Goal) -> Self {
        Self {
            goal,
            state: State::Greeting,
            no_zeroes: false,
            framing: Framing::Simple,
            contexts: Vec::new(),
            export: None,
            blocks: None,
            listed: Vec::new(),
            replies: 0,
        }
    }

    /// Takes what it understands from `input` and appends what is to be sent to `output`.
    ///
    /// # Errors
    /// The server refused the goal or broke the protocol; the connection is of no use then.
    pub fn step(&mut self, input: &mut BytesMut, output: &mut BytesMut) -> Result<Progress> {
        loop {
            let progress = match self.state {
                State::Greeting => self.greeting(input, output)?,
                State::OldStyle => self.old_style(input)?,
                State::ExportName => self.export_name_reply(input)?,
                State::Done => return Err(Error::Protocol("the handshake is already over".into())),
                _ => match OptionReply::take(input).map_err(Error::Protocol)? {
                    Some(reply) => self.option_reply(&reply, output)?,
                    None => return Ok(Progress::More),
                },
            };
            match progress {
                Some(progress) => return Ok(progress),
                None => continue,
            }
        }
    }

    /// What it means that the server closed the connection now.
    pub fn closed_early(&self) -> Error {
        match (self.state, &self.goal) {
            // The only way in which this option can be refused.
            (State::ExportName, Goal::Export { name, .. }) => Error::UnknownExport {
                name: name.clone(),
                message: "it closed the connection, which is how old servers refuse a name".into(),
            },
            (state, _) => Error::lost(format!("the server closed it during the handshake ({state:?})")),
        }
    }

    fn greeting(&mut self, input: &mut BytesMut, output: &mut BytesMut) -> Result<Option<Progress>> {
        let Some(mut head) = input.get(..16) else { return Ok(Some(Progress::More)) };
        let (magic, style) = (head.get_u64(), head.get_u64());
        if magic != wire::NBD_MAGIC {
            return Err(Error::Protocol(format!("the greeting begins with {magic:#x}; this is no NBD server")));
        }
        match style {
            wire::OLD_STYLE_MAGIC => {
                input.advance(16);
                self.state = State::OldStyle;
                return Ok(None);
            }
            wire::OPTION_MAGIC => {}
            other => return Err(Error::Protocol(format!("the greeting is of the unknown style {other:#x}"))),
        }
        let Some(mut flags) = input.get(16..18) else { return Ok(Some(Progress::More)) };
        let flags = flags.get_u16();
        input.advance(18);
        let known = flags & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        self.no_zeroes = known & handshake_flag::NO_ZEROES != 0;
        output.put_u32(u32::from(known));
        let fixed = known & handshake_flag::FIXED_NEWSTYLE != 0;
        match (&self.goal, fixed) {
            (Goal::List, true) => self.ask(State::List, option::LIST, &[], output),
            (Goal::List, false) => {
                return Err(Error::Unsupported { what: "listing exports (it does not speak fixed newstyle)" });
            }
            (Goal::Export { .. }, false) => self.ask_export_name(output),
            (Goal::Export { framing: Framing::Extended, .. }, true) => {
                self.ask(State::Extended, option::EXTENDED_HEADERS, &[], output);
            }
            (Goal::Export { framing: Framing::Structured, .. }, true) => {
                self.ask(State::Structured, option::STRUCTURED_REPLY, &[], output);
            }
            (Goal::Export { framing: Framing::Simple, .. }, true) => self.ask_go(output),
        }
        Ok(None)
    }

    /// Size, flags of both kinds, and 124 bytes of nothing.
    fn old_style(&mut self, input: &mut BytesMut) -> Result<Option<Progress>> {
        let Some(mut body) = input.get(..8 + 4 + 124) else { return Ok(Some(Progress::More)) };
        let size = body.get_u64();
        let _handshake_flags = body.get_u16();
        let flags = body.get_u16();
        input.advance(8 + 4 + 124);
        match &self.goal {
            Goal::List => Err(Error::Unsupported { what: "listing exports (it speaks the old style)" }),
            Goal::Export { name, .. } if !name.is_empty() => Err(Error::UnknownExport {
                name: name.clone(),
                message: "it speaks the old style, which has only the default export".into(),
            }),
            Goal::Export { .. } => {
                self.export = Some((size, flags));
                self.finish().map(Some)
            }
        }
    }

    fn export_name_reply(&mut self, input: &mut BytesMut) -> Result<Option<Progress>> {
        let length = if self.no_zeroes { 10 } else { 10 + 124 };
        let Some(mut body) = input.get(..length) else { return Ok(Some(Progress::More)) };
        self.export = Some((body.get_u64(), body.get_u16()));
        input.advance(length);
        self.finish().map(Some)
    }

    fn option_reply(&mut self, reply: &OptionReply, output: &mut BytesMut) -> Result<Option<Progress>> {
        let asked = match self.state {
            State::Extended => option::EXTENDED_HEADERS,
            State::Structured => option::STRUCTURED_REPLY,
            State::Contexts => option::SET_META_CONTEXT,
            State::Go => option::GO,
            _ => option::LIST,
        };
        if reply.option != asked {
            return Err(Error::Protocol(format!(
                "an answer to {} ({}), but {} was asked",
                option::name(reply.option),
                reply.option,
                option::name(asked)
            )));
        }
        self.replies += 1;
        if self.replies > REPLIES_MAX {
            return Err(Error::Protocol(format!("more than {REPLIES_MAX} answers to {}", option::name(asked))));
        }
        match self.state {
            State::Extended => {
                if self.accepted(reply)? {
                    self.framing = Framing::Extended;
                    self.ask_contexts(output);
                } else {
                    self.ask(State::Structured, option::STRUCTURED_REPLY, &[], output);
                }
            }
            State::Structured => {
                if self.accepted(reply)? {
                    self.framing = Framing::Structured;
                    self.ask_contexts(output);
                } else {
                    self.ask_go(output);
                }
            }
            State::Contexts => self.context_reply(reply, output)?,
            State::Go => return self.go_reply(reply, output),
            _ => return self.list_reply(reply, output),
        }
        Ok(None)
    }

    /// For options that are answered yes or no: anything that is an error is a no.
    fn accepted(&self, reply: &OptionReply) -> Result<bool> {
        match reply.kind {
            option_reply::ACK => Ok(true),
            kind if kind & option_reply::ERROR_BIT != 0 => Ok(false),
            _ => Err(unexpected(reply)),
        }
    }

    fn context_reply(&mut self, reply: &OptionReply, output: &mut BytesMut) -> Result<()> {
        match reply.kind {
            option_reply::META_CONTEXT => {
                let mut data = &reply.data[..];
                let id = data.try_get_u32().map_err(|_| unexpected(reply))?;
                let name = String::from_utf8(data.to_vec()).map_err(|_| unexpected(reply))?;
                if self.contexts.iter().any(|(known, known_id)| *known == name || *known_id == id) {
                    return Err(Error::Protocol(format!("the context {name:?} (id {id}) was announced twice")));
                }
                if self.contexts.len() >= CONTEXTS_MAX {
                    return Err(Error::Protocol(format!("more than {CONTEXTS_MAX} contexts")));
                }
                self.contexts.push((name, id));
            }
            option_reply::ACK => self.ask_go(output),
            kind if kind & option_reply::ERROR_BIT != 0 => {
                // No contexts then. If the export itself is unknown, the next option says so in clearer words.
                self.contexts.clear();
                self.ask_go(output);
            }
            _ => return Err(unexpected(reply)),
        }
        Ok(())
    }

    fn go_reply(&mut self, reply: &OptionReply, output: &mut BytesMut) -> Result<Option<Progress>> {
        match reply.kind {
            option_reply::INFO => self.info_reply(reply).map(|()| None),
            option_reply::ACK => self.finish().map(Some),
            option_reply::ERR_UNSUP => {
                self.ask_export_name(output);
                Ok(None)
            }
            option_reply::ERR_UNKNOWN => {
                Err(Error::UnknownExport { name: self.export_name().to_string(), message: text(&reply.data) })
            }
            kind if kind & option_reply::ERROR_BIT != 0 => Err(refused(reply)),
            _ => Err(unexpected(reply)),
        }
    }

    fn info_reply(&mut self, reply: &OptionReply) -> Result<()> {
        let bad = |_| unexpected(reply);
        let mut data = &reply.data[..];
        match data.try_get_u16().map_err(bad)? {
            info::EXPORT => {
                self.export = Some((data.try_get_u64().map_err(bad)?, data.try_get_u16().map_err(bad)?));
            }
            info::BLOCK_SIZE => {
                let min = data.try_get_u32().map_err(bad)?;
                let preferred = data.try_get_u32().map_err(bad)?;
                let max = data.try_get_u32().map_err(bad)?;
                let sound = min.is_power_of_two() && min <= 65_536 && preferred >= min && max >= min;
                if !sound {
                    return Err(Error::Protocol(format!("impossible block sizes {min}, {preferred}, {max}")));
                }
                self.blocks = Some((min, preferred, max));
            }
            _ => {}
        }
        Ok(())
    }

    fn list_reply(&mut self, reply: &OptionReply, output: &mut BytesMut) -> Result<Option<Progress>> {
        match reply.kind {
            option_reply::SERVER => {
                let mut data = &reply.data[..];
                let length = data.try_get_u32().map_err(|_| unexpected(reply))? as usize;
                let (name, description) = data.split_at_checked(length).ok_or_else(|| unexpected(reply))?;
                self.listed.push(ExportEntry { name: text(name), description: text(description) });
                Ok(None)
            }
            option_reply::ACK => {
                self.ask(State::Done, option::ABORT, &[], output);
                Ok(Some(Progress::Listed(std::mem::take(&mut self.listed))))
            }
            kind if kind & option_reply::ERROR_BIT != 0 => Err(refused(reply)),
            _ => Err(unexpected(reply)),
        }
    }

    fn ask(&mut self, next: State, option: u32, data: &[u8], output: &mut BytesMut) {
        wire::put_option(output, option, data);
        self.state = next;
        self.replies = 0;
    }

    fn ask_contexts(&mut self, output: &mut BytesMut) {
        let Goal::Export { name, contexts, .. } = &self.goal else { return };
        if contexts.is_empty() {
            return self.ask_go(output);
        }
        let mut data = Vec::new();
        wire::put_string(&mut data, name);
        data.put_u32(contexts.len() as u32);
        for context in contexts {
            wire::put_string(&mut data, context);
        }
        self.ask(State::Contexts, option::SET_META_CONTEXT, &data, output);
    }

    fn ask_go(&mut self, output: &mut BytesMut) {
        let mut data = Vec::new();
        wire::put_string(&mut data, self.export_name());
        data.put_u16(1);
        data.put_u16(info::BLOCK_SIZE);
        self.ask(State::Go, option::GO, &data, output);
    }

    fn ask_export_name(&mut self, output: &mut BytesMut) {
        let name = self.export_name().as_bytes().to_vec();
        self.ask(State::ExportName, option::EXPORT_NAME, &name, output);
    }

    fn export_name(&self) -> &str {
        match &self.goal {
            Goal::Export { name, .. } => name,
            Goal::List => "",
        }
    }

    fn finish(&mut self) -> Result<Progress> {
        let (size_bytes, flags) =
            self.export.ok_or_else(|| Error::Protocol("the export was accepted without its size".into()))?;
        if i64::try_from(size_bytes).is_err() {
            return Err(Error::Protocol(format!("an export of {size_bytes} bytes")));
        }
        // Without word from the server, the protocol recommends to stay within these.
        let (block_min, block_preferred, block_max) = self.blocks.unwrap_or((1, 4096, 32 << 20));
        let has = |flag| flags & flag != 0;
        let (contexts, context_ids) = std::mem::take(&mut self.contexts).into_iter().unzip();
        self.state = State::Done;
        Ok(Progress::Ready(Negotiated {
            info: ExportInfo {
                size_bytes,
                read_only: has(export_flag::READ_ONLY),
                can_flush: has(export_flag::SEND_FLUSH),
                can_trim: has(export_flag::SEND_TRIM),
                can_write_zeroes: has(export_flag::SEND_WRITE_ZEROES),
                can_fua: has(export_flag::SEND_FUA),
                can_multi_conn: has(export_flag::CAN_MULTI_CONN),
                block_min,
                block_preferred,
                block_max,
                structured: self.framing >= Framing::Structured,
                extended: self.framing == Framing::Extended,
                contexts,
            },
            framing: self.framing,
            context_ids,
        }))
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(wire::STRING_MAX)]).into_owned()
}

fn refused(reply: &OptionReply) -> Error {
    Error::Refused {
        what: option::name(reply.option),
        reason: option_reply::error_name(reply.kind),
        message: text(&reply.data),
    }
}

fn unexpected(reply: &OptionReply) -> Error {
    let head: Bytes = reply.data.slice(..reply.data.len().min(16));
    Error::Protocol(format!(
        "an answer of kind {:#x} to {} that makes no sense there: {head:?}",
        reply.kind,
        option::name(reply.option)
    ))
}

#[cfg(test)]
mod tests;
