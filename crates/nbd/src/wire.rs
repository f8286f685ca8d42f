//! The NBD wire format: numbers and fixed-size headers, encoded and decoded. No state, no input or output.
//!
//! Field names follow the protocol document of the NBD project. All numbers are big-endian. What varies in length is
//! bounded here, by the constants at the end, before anybody allocates for it.

use bytes::{Buf, BufMut, Bytes, BytesMut};

pub(crate) const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(crate) const OLD_STYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(crate) const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(crate) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
pub(crate) const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

pub(crate) mod handshake_flag {
    pub const FIXED_NEWSTYLE: u16 = 1;
    pub const NO_ZEROES: u16 = 2;
}

pub(crate) mod export_flag {
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

pub(crate) mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;

    pub fn name(option: u32) -> &'static str {
        match option {
            EXPORT_NAME => "NBD_OPT_EXPORT_NAME",
            ABORT => "NBD_OPT_ABORT",
            LIST => "NBD_OPT_LIST",
            GO => "NBD_OPT_GO",
            STRUCTURED_REPLY => "NBD_OPT_STRUCTURED_REPLY",
            SET_META_CONTEXT => "NBD_OPT_SET_META_CONTEXT",
            EXTENDED_HEADERS => "NBD_OPT_EXTENDED_HEADERS",
            _ => "an unknown option",
        }
    }
}

pub(crate) mod option_reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERROR_BIT: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR_BIT + 1;
    pub const ERR_UNKNOWN: u32 = ERROR_BIT + 6;

    pub fn error_name(kind: u32) -> &'static str {
        match kind & !ERROR_BIT {
            1 => "NBD_REP_ERR_UNSUP",
            2 => "NBD_REP_ERR_POLICY",
            3 => "NBD_REP_ERR_INVALID",
            4 => "NBD_REP_ERR_PLATFORM",
            5 => "NBD_REP_ERR_TLS_REQD",
            6 => "NBD_REP_ERR_UNKNOWN",
            7 => "NBD_REP_ERR_SHUTDOWN",
            8 => "NBD_REP_ERR_BLOCK_SIZE_REQD",
            9 => "NBD_REP_ERR_TOO_BIG",
            10 => "NBD_REP_ERR_EXT_HEADER_REQD",
            _ => "an error that NBD does not define",
        }
    }
}

pub(crate) mod info {
    pub const EXPORT: u16 = 0;
    pub const BLOCK_SIZE: u16 = 3;
}

pub(crate) mod command_flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

pub(crate) mod chunk {
    pub const FLAG_DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR_BIT: u16 = 1 << 15;
    pub const ERROR: u16 = ERROR_BIT + 1;
    pub const ERROR_OFFSET: u16 = ERROR_BIT + 2;
}

/// Longest string of the protocol: names and messages.
pub(crate) const STRING_MAX: usize = 4096;
/// Longest answer to an option: the longest legal one is a name, a description and some framing.
pub(crate) const OPTION_REPLY_MAX: usize = 2 * STRING_MAX + 64;
/// Longest error chunk: number, length, message, offset.
pub(crate) const ERROR_CHUNK_MAX: usize = 4 + 2 + STRING_MAX + 8;
/// Longest block-status chunk: a million extents of the wide form (QEMU stops at an eighth of it).
pub(crate) const STATUS_CHUNK_MAX: usize = 8 + (1 << 20) * 16;

/// The kinds of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// `NBD_CMD_READ`
    Read,
    /// `NBD_CMD_WRITE`
    Write,
    /// `NBD_CMD_DISC`
    Disconnect,
    /// `NBD_CMD_FLUSH`
    Flush,
    /// `NBD_CMD_TRIM`
    Trim,
    /// `NBD_CMD_WRITE_ZEROES`
    WriteZeroes,
    /// `NBD_CMD_BLOCK_STATUS`
    BlockStatus,
}

impl Command {
    fn code(self) -> u16 {
        match self {
            Command::Read => 0,
            Command::Write => 1,
            Command::Disconnect => 2,
            Command::Flush => 3,
            Command::Trim => 4,
            Command::WriteZeroes => 6,
            Command::BlockStatus => 7,
        }
    }

    /// A word for messages.
    pub fn name(self) -> &'static str {
        match self {
            Command::Read => "read",
            Command::Write => "write",
            Command::Disconnect => "disconnect",
            Command::Flush => "flush",
            Command::Trim => "trim",
            Command::WriteZeroes => "write-zeroes",
            Command::BlockStatus => "block-status",
        }
    }
}

/// Which framing the transmission phase uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Framing {
    /// Simple replies: data follows the header, in one piece.
    Simple,
    /// Structured replies: chunks, holes, block status, messages.
    Structured,
    /// Extended headers: as structured, with 64-bit lengths.
    Extended,
}

/// Appends the header of a request.
pub(crate) fn put_request(
    out: &mut BytesMut,
    framing: Framing,
    command: Command,
    flags: u16,
    cookie: u64,
    offset: u64,
    length: u64,
) {
    if framing == Framing::Extended {
        let flags = if command == Command::Write { flags | command_flag::PAYLOAD_LEN } else { flags };
        out.put_u32(EXTENDED_REQUEST_MAGIC);
        out.put_u16(flags);
        out.put_u16(command.code());
        out.put_u64(cookie);
        out.put_u64(offset);
        out.put_u64(length);
    } else {
        debug_assert!(u32::try_from(length).is_ok());
        out.put_u32(REQUEST_MAGIC);
        out.put_u16(flags);
        out.put_u16(command.code());
        out.put_u64(cookie);
        out.put_u64(offset);
        out.put_u32(length as u32);
    }
}

/// What stands behind the magic number of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReplyHeader {
    Simple { errno: u32, cookie: u64 },
    Chunk { flags: u16, kind: u16, cookie: u64, length: u64 },
}

impl ReplyHeader {
    /// Bytes behind the magic number, or `None` if the magic number has no place in this framing.
    pub(crate) fn length_after(magic: u32, framing: Framing) -> Option<usize> {
        match (magic, framing) {
            (SIMPLE_REPLY_MAGIC, Framing::Simple | Framing::Structured) => Some(12),
            (STRUCTURED_REPLY_MAGIC, Framing::Structured) => Some(16),
            (EXTENDED_REPLY_MAGIC, Framing::Extended) => Some(28),
            _ => None,
        }
    }

    /// Decodes what follows `magic`; `None` if `bytes` is not of the length that [`Self::length_after`] gives.
    pub(crate) fn decode(magic: u32, mut bytes: &[u8]) -> Option<Self> {
        let header = match magic {
            SIMPLE_REPLY_MAGIC => Self::Simple { errno: bytes.try_get_u32().ok()?, cookie: bytes.try_get_u64().ok()? },
            STRUCTURED_REPLY_MAGIC => Self::Chunk {
                flags: bytes.try_get_u16().ok()?,
                kind: bytes.try_get_u16().ok()?,
                cookie: bytes.try_get_u64().ok()?,
                length: u64::from(bytes.try_get_u32().ok()?),
            },
            EXTENDED_REPLY_MAGIC => {
                let flags = bytes.try_get_u16().ok()?;
                let kind = bytes.try_get_u16().ok()?;
                let cookie = bytes.try_get_u64().ok()?;
                let _offset_of_request = bytes.try_get_u64().ok()?;
                Self::Chunk { flags, kind, cookie, length: bytes.try_get_u64().ok()? }
            }
            _ => return None,
        };
        bytes.is_empty().then_some(header)
    }
}

/// Body of an error chunk: number, message, and the offset if the chunk is of the kind that has one.
pub(crate) fn decode_error_chunk(kind: u16, mut body: &[u8]) -> Option<(u32, String, Option<u64>)> {
    let errno = body.try_get_u32().ok()?;
    if kind != chunk::ERROR && kind != chunk::ERROR_OFFSET {
        // A kind that is newer than this client: the number is all that is promised.
        return Some((errno, String::new(), None));
    }
    let length = usize::from(body.try_get_u16().ok()?);
    let (message, mut rest) = body.split_at_checked(length)?;
    let offset = if kind == chunk::ERROR_OFFSET { Some(rest.try_get_u64().ok()?) } else { None };
    rest.is_empty().then(|| (errno, String::from_utf8_lossy(message).into_owned(), offset))
}

/// Descriptors of a block-status chunk: the context's id, then (length, flags) pairs.
pub(crate) fn decode_status_chunk(kind: u16, mut body: &[u8]) -> Option<(u32, Vec<(u64, u64)>)> {
    let context = body.try_get_u32().ok()?;
    let wide = kind == chunk::BLOCK_STATUS_EXT;
    let count = if wide {
        let count = body.try_get_u32().ok()? as usize;
        (count.checked_mul(16)? == body.len()).then_some(count)?
    } else {
        body.len().is_multiple_of(8).then_some(body.len() / 8)?
    };
    let mut pairs = Vec::with_capacity(count);
    for _ in 0..count {
        pairs.push(if wide {
            (body.try_get_u64().ok()?, body.try_get_u64().ok()?)
        } else {
            (u64::from(body.try_get_u32().ok()?), u64::from(body.try_get_u32().ok()?))
        });
    }
    Some((context, pairs))
}

/// Appends an option of the handshake.
pub(crate) fn put_option(out: &mut BytesMut, option: u32, data: &[u8]) {
    out.put_u64(OPTION_MAGIC);
    out.put_u32(option);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
}

/// Appends a string with its 32-bit length in front.
pub(crate) fn put_string(out: &mut Vec<u8>, text: &str) {
    out.put_u32(text.len() as u32);
    out.put_slice(text.as_bytes());
}

/// One answer to an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OptionReply {
    pub option: u32,
    pub kind: u32,
    pub data: Bytes,
}

impl OptionReply {
    const HEADER: usize = 20;

    /// Takes one answer off the front of `input`; `Ok(None)` if it is not all there yet.
    pub(crate) fn take(input: &mut BytesMut) -> Result<Option<Self>, String> {
        let Some(mut header) = input.get(..Self::HEADER) else { return Ok(None) };
        let magic = header.get_u64();
        let option = header.get_u32();
        let kind = header.get_u32();
        let length = header.get_u32() as usize;
        if magic != OPTION_REPLY_MAGIC {
            return Err(format!("an answer to an option begins with {magic:#x}"));
        }
        if length > OPTION_REPLY_MAX {
            return Err(format!("an answer of {length} bytes to {}", option::name(option)));
        }
        if input.len() < Self::HEADER + length {
            return Ok(None);
        }
        input.advance(Self::HEADER);
        Ok(Some(Self { option, kind, data: input.split_to(length).freeze() }))
    }
}
