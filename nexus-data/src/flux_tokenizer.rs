//! The tokenizers of the FLUX text encoders, for negative prompts: text -> a fixed number of CLIP or T5 token ids.

use std::path::{Path, PathBuf};

use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, NormalizerWrapper, Replace, Sequence};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as Steps;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use crate::error::{BoxedSource, DataError};
use crate::tokenizer::{read_tokenizer_json, token_id};

/// Number of ids that the CLIP text encoder reads.
pub const CLIP_LEN: usize = 77;

/// Number of ids that the T5 text encoder reads.
pub const T5_LEN: usize = 512;

const CLIP_BOS: &str = "<|startoftext|>";
const CLIP_EOS: &str = "<|endoftext|>";
const T5_EOS: &str = "</s>";
const T5_PAD: &str = "<pad>";

/// What CLIP takes for a word; everything between words is dropped.
const CLIP_WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// CLIP ids of an empty text: begin, then end to the last place. Needs no file, only the encoder's vocabulary size.
pub fn clip_empty_ids(vocab_size: usize, len: usize) -> Vec<u32> {
    let end = vocab_size.saturating_sub(1) as u32;
    let mut ids = vec![end; len];
    if let Some(first) = ids.first_mut() {
        *first = end.saturating_sub(1);
    }
    ids
}

/// T5 ids of an empty text: end, then padding. Needs no file.
pub fn t5_empty_ids(len: usize) -> Vec<u32> {
    let mut ids = vec![0; len];
    if let Some(first) = ids.first_mut() {
        *first = 1;
    }
    ids
}

/// The CLIP tokenizer: lower case, words, byte-level BPE with a mark at the end of a word.
///
/// Source: `CLIPTokenizer` of transformers (tokenization_clip.py). Differs: the original runs `ftfy.fix_text` first,
/// which repairs broken encodings and makes curly quotes, ligatures and full-width letters plain.
#[derive(Debug, Clone)]
pub struct ClipTokenizer {
    inner: tokenizers::Tokenizer,
    bos: u32,
    eos: u32,
}

impl ClipTokenizer {
    /// Reads `tokenizer.json`, or else `vocab.json` and `merges.txt`, from a folder.
    ///
    /// # Errors
    /// [`DataError::TokenizerMissing`] if the files are absent, [`DataError::TokenizerInvalid`] if they cannot be used,
    /// [`DataError::SpecialTokenMissing`] if they lack `<|startoftext|>` or `<|endoftext|>`.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, DataError> {
        let dir = dir.as_ref();
        let (json, vocab) = (dir.join("tokenizer.json"), dir.join("vocab.json"));
        let (path, inner) = if json.exists() {
            let inner = read_tokenizer_json(&json)?;
            (json, inner)
        } else {
            let inner = clip_pipeline(read_vocab_and_merges(&vocab, &dir.join("merges.txt"))?)
                .map_err(|source| DataError::TokenizerInvalid { path: vocab.clone(), source })?;
            (vocab, inner)
        };
        let (bos, eos) = (token_id(&inner, CLIP_BOS, &path)?, token_id(&inner, CLIP_EOS, &path)?);
        let mut inner = inner;
        inner.add_special_tokens(&[AddedToken::from(CLIP_BOS, true), AddedToken::from(CLIP_EOS, true)]);
        Ok(Self { inner, bos, eos })
    }

    /// The 77 ids of a text: begin, the text as far as it fits, end, and end again as padding.
    ///
    /// # Errors
    /// [`DataError::Tokenize`] if the tokenizer cannot represent the text.
    pub fn encode_padded(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let encoding = self.inner.encode_fast(text, false).map_err(|source| DataError::Tokenize { source })?;
        let words = encoding.get_ids().iter().copied();
        let mut ids: Vec<u32> = std::iter::once(self.bos).chain(words).take(CLIP_LEN - 1).collect();
        ids.resize(CLIP_LEN, self.eos);
        Ok(ids)
    }
}

fn read_vocab_and_merges(vocab: &Path, merges: &Path) -> Result<BPE, DataError> {
    for path in [vocab, merges] {
        if !path.exists() {
            return Err(DataError::TokenizerMissing { path: path.to_path_buf() });
        }
    }
    let invalid = |path: &Path, source: BoxedSource| DataError::TokenizerInvalid { path: path.to_path_buf(), source };
    let not_unicode = |path: &Path| invalid(path, "the path is not Unicode".into());
    let vocab_name = vocab.to_str().ok_or_else(|| not_unicode(vocab))?;
    let merges_name = merges.to_str().ok_or_else(|| not_unicode(merges))?;
    let (words, pairs) = BPE::read_file(vocab_name, merges_name).map_err(|source| invalid(vocab, source))?;
    BPE::builder()
        .vocab_and_merges(words, pairs)
        .unk_token(CLIP_EOS.to_string())
        .end_of_word_suffix("</w>".to_string())
        .build()
        .map_err(|source| invalid(merges, source))
}

fn clip_pipeline(bpe: BPE) -> Result<tokenizers::Tokenizer, BoxedSource> {
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".to_string()), " ")?;
    let steps: [NormalizerWrapper; 3] = [NFC.into(), spaces.into(), Lowercase.into()];
    // Inverted: the matches are kept, and what lies between them is removed.
    let words = Split::new(SplitPattern::Regex(CLIP_WORDS.to_string()), SplitDelimiterBehavior::Removed, true)?;
    let bytes = ByteLevel::default().add_prefix_space(false);
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_normalizer(Some(Sequence::new(steps.into())));
    tokenizer.with_pre_tokenizer(Some(Steps::new(vec![
        PreTokenizerWrapper::Split(words),
        PreTokenizerWrapper::ByteLevel(bytes),
    ])));
    Ok(tokenizer)
}

/// The T5 tokenizer.
#[derive(Debug, Clone)]
pub struct T5Tokenizer {
    inner: tokenizers::Tokenizer,
    eos: u32,
    pad: u32,
}

impl T5Tokenizer {
    /// Reads `tokenizer.json` from a folder.
    ///
    /// # Errors
    /// [`DataError::SentencePieceOnly`] if the folder has `spiece.model` only; [`DataError::TokenizerMissing`] if it has
    /// neither; [`DataError::TokenizerInvalid`] if the file cannot be used; [`DataError::SpecialTokenMissing`] if it
    /// lacks `</s>` or `<pad>`.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, DataError> {
        let path: PathBuf = dir.as_ref().join("tokenizer.json");
        let sentencepiece = dir.as_ref().join("spiece.model");
        if !path.exists() && sentencepiece.exists() {
            return Err(DataError::SentencePieceOnly { path: sentencepiece });
        }
        let inner = read_tokenizer_json(&path)?;
        let (eos, pad) = (token_id(&inner, T5_EOS, &path)?, token_id(&inner, T5_PAD, &path)?);
        Ok(Self { inner, eos, pad })
    }

    /// The 512 ids of a text: the text as far as it fits, end, and padding.
    ///
    /// # Errors
    /// [`DataError::Tokenize`] if the tokenizer cannot represent the text.
    pub fn encode_padded(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let encoding = self.inner.encode_fast(text, false).map_err(|source| DataError::Tokenize { source })?;
        let mut ids: Vec<u32> = encoding.get_ids().iter().copied().take(T5_LEN - 1).collect();
        ids.push(self.eos);
        ids.resize(T5_LEN, self.pad);
        Ok(ids)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    /// Writes a CLIP tokenizer with three merges: bytes, bytes at the end of a word, merges, begin, end.
    fn write_clip(dir: &Path, without: &str) -> BTreeMap<String, u32> {
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let bytes = alphabet.iter().map(char::to_string);
        let ends = alphabet.iter().map(|byte| format!("{byte}</w>"));
        let rest = ["ca", "cat</w>", "'s</w>", CLIP_BOS, CLIP_EOS].map(str::to_string);
        let tokens = bytes.chain(ends).chain(rest).filter(|token| token != without);
        let vocab: BTreeMap<String, u32> = tokens.zip(0..).collect();
        std::fs::write(dir.join("vocab.json"), serde_json::to_string(&vocab).unwrap()).unwrap();
        std::fs::write(dir.join("merges.txt"), "#version: 0.2\nc a\nca t</w>\n' s</w>\n").unwrap();
        vocab
    }

    #[test]
    fn clip_splits_words_and_pads_with_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let vocab = write_clip(dir.path(), "");
        let clip = ClipTokenizer::open(dir.path()).unwrap();
        for (text, tokens) in [
            ("", &[][..]),
            (" \n", &[]),
            ("A CAT's  cats", &["a</w>", "cat</w>", "'s</w>", "ca", "t", "s</w>"]),
            ("12 é", &["1</w>", "2</w>", "Ã", "©</w>"]),
            ("e\u{301}!?", &["Ã", "©</w>", "!", "?</w>"]),
            ("猫犬", &["ç", "Į", "«", "ç", "Ĭ", "¬</w>"]),
            ("a<|endoftext|>b", &["a</w>", CLIP_EOS, "b</w>"]),
        ] {
            let mut expected = vec![vocab[CLIP_BOS]];
            expected.extend(tokens.iter().map(|&token| vocab[token]));
            expected.resize(77, vocab[CLIP_EOS]);
            assert_eq!(clip.encode_padded(text).unwrap(), expected, "{text:?}");
        }
    }

    #[test]
    fn clip_cuts_a_long_text_before_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let vocab = write_clip(dir.path(), "");
        let ids = ClipTokenizer::open(dir.path()).unwrap().encode_padded(&"cat ".repeat(100)).unwrap();
        assert_eq!(ids.len(), CLIP_LEN);
        assert_eq!(ids[0], vocab[CLIP_BOS]);
        assert!(ids[1..76].iter().all(|&id| id == vocab["cat</w>"]));
        assert_eq!(ids[76], vocab[CLIP_EOS]);
    }

    #[test]
    fn clip_reads_tokenizer_json_too() {
        let dir = tempfile::tempdir().unwrap();
        write_clip(dir.path(), "");
        let from_parts = ClipTokenizer::open(dir.path()).unwrap();
        from_parts.inner.save(dir.path().join("tokenizer.json"), false).unwrap();
        std::fs::remove_file(dir.path().join("vocab.json")).unwrap();
        let from_json = ClipTokenizer::open(dir.path()).unwrap();
        let text = "A cat's <|endoftext|> 猫 12";
        assert_eq!(from_json.encode_padded(text).unwrap(), from_parts.encode_padded(text).unwrap());
    }

    #[test]
    fn empty_texts_need_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let vocab = write_clip(dir.path(), "");
        let clip = ClipTokenizer::open(dir.path()).unwrap();
        assert_eq!(clip_empty_ids(vocab.len(), CLIP_LEN), clip.encode_padded("").unwrap());
        assert_eq!(clip_empty_ids(49_408, 3), [49_406, 49_407, 49_407]);
        assert_eq!(t5_empty_ids(4), [1, 0, 0, 0]);
        assert!(clip_empty_ids(10, 0).is_empty() && t5_empty_ids(0).is_empty());
    }

    #[test]
    fn an_unusable_clip_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let open = || ClipTokenizer::open(dir.path()).map(|_| ());
        assert!(matches!(open(), Err(DataError::TokenizerMissing { path }) if path.ends_with("vocab.json")));
        write_clip(dir.path(), CLIP_BOS);
        assert!(matches!(open(), Err(DataError::SpecialTokenMissing { token: CLIP_BOS, .. })));
        std::fs::write(dir.path().join("merges.txt"), "#version: 0.2\nno pair here\n").unwrap();
        assert!(matches!(open(), Err(DataError::TokenizerInvalid { .. })));
        std::fs::remove_file(dir.path().join("merges.txt")).unwrap();
        assert!(matches!(open(), Err(DataError::TokenizerMissing { path }) if path.ends_with("merges.txt")));
        std::fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
        assert!(matches!(open(), Err(DataError::TokenizerInvalid { .. })));
    }

    fn write_t5(dir: &Path, eos: &str) {
        let vocab = json!([["<pad>", 0.0], [eos, 0.0], ["<unk>", -9.0], ["▁a", -1.0], ["b", -2.0], ["▁", -3.0]]);
        let file = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": {"type": "NFKC"},
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
            "post_processor": null, "decoder": null,
            "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": false}});
        std::fs::write(dir.join("tokenizer.json"), file.to_string()).unwrap();
    }

    #[test]
    fn t5_appends_the_end_and_pads() {
        let dir = tempfile::tempdir().unwrap();
        write_t5(dir.path(), T5_EOS);
        let t5 = T5Tokenizer::open(dir.path()).unwrap();
        let ids = t5.encode_padded("ab b").unwrap();
        assert_eq!(ids.len(), T5_LEN);
        assert_eq!(ids[..7], [3, 4, 5, 4, 1, 0, 0]);
        assert_eq!(t5.encode_padded("").unwrap(), t5_empty_ids(T5_LEN));
        let long = t5.encode_padded(&"a ".repeat(600)).unwrap();
        assert_eq!(long.len(), T5_LEN);
        assert_eq!(long[509..], [3, 3, 1]);
    }

    #[test]
    fn an_unusable_t5_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let open = || T5Tokenizer::open(dir.path()).map(|_| ());
        assert!(matches!(open(), Err(DataError::TokenizerMissing { .. })));
        std::fs::write(dir.path().join("spiece.model"), "x").unwrap();
        let error = open().unwrap_err();
        assert!(matches!(&error, DataError::SentencePieceOnly { path } if path.ends_with("spiece.model")));
        assert!(error.to_string().contains("tokenizer.json"));
        std::fs::write(dir.path().join("tokenizer.json"), "[]").unwrap();
        assert!(matches!(open(), Err(DataError::TokenizerInvalid { .. })));
        write_t5(dir.path(), "<end>");
        assert!(matches!(open(), Err(DataError::SpecialTokenMissing { token: T5_EOS, .. })));
    }
}
