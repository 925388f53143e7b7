//! Protobuf's wire format (protobuf.dev, "Encoding").

use super::ProtobufError;

/// A field as it is on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Field<'a> {
    pub(super) number: u64,
    pub(super) value: Wire<'a>,
}

/// The four forms that are in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wire<'a> {
    Varint(u64),
    Fixed(u64),
    Bytes(&'a [u8]),
}

impl<'a> Wire<'a> {
    pub(super) fn bytes(self, name: &str) -> Result<&'a [u8], ProtobufError> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            _ => Err(ProtobufError::WrongType(name.to_owned())),
        }
    }

    pub(super) fn number(self, name: &str) -> Result<u64, ProtobufError> {
        match self {
            Self::Varint(number) => Ok(number),
            _ => Err(ProtobufError::WrongType(name.to_owned())),
        }
    }

    pub(super) fn fixed(self, name: &str) -> Result<u64, ProtobufError> {
        match self {
            Self::Fixed(bits) => Ok(bits),
            _ => Err(ProtobufError::WrongType(name.to_owned())),
        }
    }
}

/// The fields of a message, one after the other; ends after an error.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    fn field(&mut self) -> Result<Field<'a>, ProtobufError> {
        let tag = varint(&mut self.rest)?;
        let value = match tag & 7 {
            0 => Wire::Varint(varint(&mut self.rest)?),
            1 => Wire::Fixed(u64::from_le_bytes(self.array()?)),
            2 => {
                let length = varint(&mut self.rest)?;
                let length = usize::try_from(length).map_err(|_| ProtobufError::Malformed)?;
                let split = self.rest.split_at_checked(length).ok_or(ProtobufError::Malformed)?;
                self.rest = split.1;
                Wire::Bytes(split.0)
            }
            5 => Wire::Fixed(u64::from(u32::from_le_bytes(self.array()?))),
            _ => return Err(ProtobufError::Malformed), // groups are long gone
        };
        Ok(Field { number: tag >> 3, value })
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ProtobufError> {
        let (first, rest) = self.rest.split_first_chunk().ok_or(ProtobufError::Malformed)?;
        self.rest = rest;
        Ok(*first)
    }
}

impl<'a> Iterator for Reader<'a> {
    type Item = Result<Field<'a>, ProtobufError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}

/// A number of up to ten bytes, seven bits each, the lowest first.
pub(super) fn varint(bytes: &mut &[u8]) -> Result<u64, ProtobufError> {
    let mut number = 0u64;
    for shift in (0..70).step_by(7) {
        let (byte, rest) = bytes.split_first().ok_or(ProtobufError::Malformed)?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or_default();
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(ProtobufError::Malformed)
}
