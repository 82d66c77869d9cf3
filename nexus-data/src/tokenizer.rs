//! The tokenizer of the language model: text -> token ids, and token ids -> text, whole or while they arrive.

use std::path::{Path, PathBuf};

use crate::error::DataError;
use crate::prompt::{IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START};

/// Ids of the tokens with a meaning of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpecialTokens {
    /// `<|vision_start|>`: begin of image.
    pub boi: u32,
    /// `<|vision_end|>`: end of image.
    pub eoi: u32,
    /// `<|image_pad|>`: place of one image embedding.
    pub image: u32,
    /// `<|video_pad|>`, if the tokenizer has it.
    pub video: Option<u32>,
    /// `<|im_start|>`: begin of a message.
    pub im_start: u32,
    /// `<|im_end|>`: end of a message, and of a reply.
    pub im_end: u32,
    /// `<|endoftext|>`: padding, and a second end of a reply.
    pub endoftext: u32,
}

/// Byte-level BPE tokenizer, as published with the model.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: SpecialTokens,
}

impl Tokenizer {
    /// Reads `tokenizer.json`: the file itself, or the one in the folder or in its `processor` subfolder.
    ///
    /// # Errors
    /// [`DataError::TokenizerMissing`] if there is no such file, [`DataError::TokenizerInvalid`] if it cannot be read,
    /// [`DataError::SpecialTokenMissing`] if it lacks a token of [`SpecialTokens`].
    pub fn open(dir_or_file: impl AsRef<Path>) -> Result<Self, DataError> {
        let path = find_tokenizer_json(dir_or_file.as_ref());
        let inner = read_tokenizer_json(&path)?;
        let id = |token| token_id(&inner, token, &path);
        let special = SpecialTokens {
            boi: id(VISION_START)?,
            eoi: id(VISION_END)?,
            image: id(IMAGE_PAD)?,
            video: inner.token_to_id(VIDEO_PAD),
            im_start: id("<|im_start|>")?,
            im_end: id("<|im_end|>")?,
            endoftext: id("<|endoftext|>")?,
        };
        Ok(Self { inner, special })
    }

    /// Ids of the tokens with a meaning of their own.
    pub fn special_tokens(&self) -> SpecialTokens {
        self.special
    }

    /// Number of ids, the added tokens included. The model's vocabulary may be larger.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Token ids of a text; nothing is added at either end, and added tokens in the text become their ids.
    ///
    /// # Errors
    /// [`DataError::Tokenize`] if the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let encoding = self.inner.encode_fast(text, false).map_err(|source| DataError::Tokenize { source })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Token ids of a text as [`Tokenizer::encode`] gives them, each with the byte of the text where it begins.
    ///
    /// # Errors
    /// [`DataError::Tokenize`] if the tokenizer cannot represent the text.
    pub(crate) fn encode_with_starts(&self, text: &str) -> Result<Vec<(u32, usize)>, DataError> {
        let encoding = self.inner.encode(text, false).map_err(|source| DataError::Tokenize { source })?;
        let starts = encoding.get_offsets().iter().map(|&(start, _)| start);
        Ok(encoding.get_ids().iter().copied().zip(starts).collect())
    }

    /// Text of token ids; `skip_special` leaves out the tokens that are marked special in the file.
    ///
    /// Ids that no token has are left out; bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`DataError::Tokenize`] if the tokenizer's decoder fails.
    pub fn decode(&self, token_ids: &[u32], skip_special: bool) -> Result<String, DataError> {
        self.inner.decode(token_ids, skip_special).map_err(|source| DataError::Tokenize { source })
    }

    /// Starts decoding token ids one by one.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, skip_special, pending: Vec::new(), num_emitted_bytes: 0 }
    }
}

/// Text of token ids while they arrive; a character whose bytes are spread over several tokens is held back until it
/// is complete.
///
/// The pieces joined are what [`Tokenizer::decode`] makes of all ids at once.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// Ids since the last token that ended with a whole character.
    pending: Vec<u32>,
    /// How much of the text of `pending` is out already.
    num_emitted_bytes: usize,
}

impl DecodeStream<'_> {
    /// Takes the next id and returns the text that is complete now, if there is any.
    ///
    /// # Errors
    /// [`DataError::Tokenize`] if the tokenizer's decoder fails.
    pub fn push(&mut self, token_id: u32) -> Result<Option<String>, DataError> {
        self.pending.push(token_id);
        let text = self.tokenizer.decode(&self.pending, self.skip_special)?;
        // An unfinished character at the end decodes to exactly one U+FFFD.
        let complete = text.strip_suffix(char::REPLACEMENT_CHARACTER);
        let new = complete.unwrap_or(&text).get(self.num_emitted_bytes..).unwrap_or_default().to_string();
        if complete.is_some() {
            self.num_emitted_bytes += new.len();
        } else {
            self.pending.clear();
            self.num_emitted_bytes = 0;
        }
        Ok(Some(new).filter(|new| !new.is_empty()))
    }

    /// Ends the stream and returns what was held back: an unfinished character, as U+FFFD.
    ///
    /// # Errors
    /// [`DataError::Tokenize`] if the tokenizer's decoder fails.
    pub fn finish(self) -> Result<Option<String>, DataError> {
        let text = self.tokenizer.decode(&self.pending, self.skip_special)?;
        Ok(text.get(self.num_emitted_bytes..).filter(|rest| !rest.is_empty()).map(str::to_string))
    }
}

fn find_tokenizer_json(dir_or_file: &Path) -> PathBuf {
    if !dir_or_file.is_dir() {
        return dir_or_file.to_path_buf();
    }
    let in_processor = dir_or_file.join("processor").join("tokenizer.json");
    let in_folder = dir_or_file.join("tokenizer.json");
    if !in_folder.exists() && in_processor.exists() { in_processor } else { in_folder }
}

/// Reads a `tokenizer.json`, without the padding and truncation that it may ask for.
pub(crate) fn read_tokenizer_json(path: &Path) -> Result<tokenizers::Tokenizer, DataError> {
    let invalid = |source| DataError::TokenizerInvalid { path: path.to_path_buf(), source };
    let bytes = std::fs::read(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => DataError::TokenizerMissing { path: path.to_path_buf() },
        _ => invalid(source.into()),
    })?;
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes).map_err(invalid)?;
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(invalid)?;
    Ok(tokenizer)
}

pub(crate) fn token_id(tokenizer: &tokenizers::Tokenizer, token: &'static str, path: &Path) -> Result<u32, DataError> {
    let missing = || DataError::SpecialTokenMissing { token, path: path.to_path_buf() };
    tokenizer.token_to_id(token).ok_or_else(missing)
}

#[cfg(test)]
pub(crate) mod testing {
    use std::path::Path;

    use serde_json::json;

    pub const SPECIAL: [&str; 7] = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ];

    /// Writes a byte-level `tokenizer.json` without merges: id 0..256 are the bytes in the order of their characters,
    /// then come the special tokens, except `omitted`.
    pub fn write_byte_tokenizer(dir: &Path, omitted: &str) {
        let mut alphabet: Vec<char> =
            tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let vocab: serde_json::Map<_, _> =
            alphabet.iter().enumerate().map(|(id, byte)| (byte.to_string(), json!(id))).collect();
        let added = |(i, token): (usize, &&str)| {
            json!({"id": 256 + i, "content": token, "special": true, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false})
        };
        let added: Vec<_> = SPECIAL.iter().filter(|token| **token != omitted).enumerate().map(added).collect();
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
        let file = json!({"version": "1.0", "truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0,
            "direction": "Right"}, "padding": null, "added_tokens": added, "normalizer": {"type": "NFC"},
            "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []}});
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("tokenizer.json"), file.to_string()).unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::testing::write_byte_tokenizer;
    use super::*;

    fn byte_tokenizer() -> Tokenizer {
        let dir = tempfile::tempdir().unwrap();
        write_byte_tokenizer(dir.path(), "");
        Tokenizer::open(dir.path()).unwrap()
    }

    #[test]
    fn special_tokens_are_found_by_content() {
        let tokenizer = byte_tokenizer();
        let expected = SpecialTokens {
            endoftext: 256,
            im_start: 257,
            im_end: 258,
            boi: 259,
            eoi: 260,
            image: 261,
            video: Some(262),
        };
        assert_eq!(tokenizer.special_tokens(), expected);
        assert_eq!(tokenizer.vocab_size(), 263);
    }

    #[test]
    fn texts_survive_the_round_trip_composed() {
        let tokenizer = byte_tokenizer();
        for text in ["", " ", "a b\r\n\tc", "一只猫 😀👩\u{200d}🚀\u{a0}", "<|im_start|>user\n<|vision_start|>"]
        {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap(), false).unwrap(), text);
        }
        assert_eq!(tokenizer.decode(&tokenizer.encode("e\u{301}").unwrap(), false).unwrap(), "é");
    }

    #[test]
    fn added_tokens_in_a_text_become_ids_and_nothing_is_cut() {
        let tokenizer = byte_tokenizer();
        // The file asks for a truncation to two tokens.
        assert_eq!(tokenizer.encode("<|im_start|>AB<|im_end|>").unwrap(), [257, 32, 33, 258]);
        assert_eq!(tokenizer.decode(&[257, 32, 33, 258], true).unwrap(), "AB");
        assert_eq!(tokenizer.decode(&[32, 9999], true).unwrap(), "A");
    }

    #[test]
    fn streams_hold_back_unfinished_characters() {
        let tokenizer = byte_tokenizer();
        let ids = tokenizer.encode("a猫b😀").unwrap();
        let mut stream = tokenizer.decode_stream(false);
        let pieces: Vec<_> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        let some = |text: &str| Some(text.to_string());
        assert_eq!(pieces, [some("a"), None, None, some("猫"), some("b"), None, None, None, some("😀")]);
        assert_eq!(stream.finish().unwrap(), None);
    }

    #[test]
    fn streams_give_what_decoding_at_once_gives() {
        let tokenizer = byte_tokenizer();
        let unfinished = [&tokenizer.encode("猫").unwrap()[..2], &tokenizer.encode("x").unwrap()].concat();
        let restarted = [&tokenizer.encode("猫").unwrap()[..2], &tokenizer.encode("猫").unwrap()].concat();
        let cut = tokenizer.encode("a😀").unwrap()[..3].to_vec();
        let literal = tokenizer.encode("\u{fffd}\u{fffd}z").unwrap();
        for ids in [unfinished, restarted, cut, literal, vec![257, 259, 258]] {
            for skip_special in [false, true] {
                let mut stream = tokenizer.decode_stream(skip_special);
                let mut text: String = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
                text.extend(stream.finish().unwrap());
                assert_eq!(text, tokenizer.decode(&ids, skip_special).unwrap());
            }
        }
    }

    #[test]
    fn the_processor_subfolder_is_searched_too() {
        let dir = tempfile::tempdir().unwrap();
        write_byte_tokenizer(&dir.path().join("processor"), "");
        assert!(Tokenizer::open(dir.path()).is_ok());
        assert!(Tokenizer::open(dir.path().join("processor/tokenizer.json")).is_ok());
    }

    #[test]
    fn an_absent_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Tokenizer::open(dir.path()).unwrap_err();
        assert!(matches!(&error, DataError::TokenizerMissing { path } if *path == dir.path().join("tokenizer.json")));
    }

    #[test]
    fn a_broken_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        for content in ["", "{", "{}", "\u{0}", r#"{"model": {"type": "Nonsense"}}"#] {
            std::fs::write(&path, content).unwrap();
            let error = Tokenizer::open(dir.path()).unwrap_err();
            assert!(matches!(&error, DataError::TokenizerInvalid { path: named, .. } if *named == path), "{content}");
        }
    }

    #[test]
    fn a_missing_special_token_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for omitted in &testing::SPECIAL[..6] {
            write_byte_tokenizer(dir.path(), omitted);
            let error = Tokenizer::open(dir.path()).unwrap_err();
            assert!(matches!(error, DataError::SpecialTokenMissing { token, .. } if token == *omitted));
        }
        write_byte_tokenizer(dir.path(), "<|video_pad|>");
        assert_eq!(Tokenizer::open(dir.path()).unwrap().special_tokens().video, None);
    }
}
