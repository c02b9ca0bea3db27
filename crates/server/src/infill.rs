//! Text between two texts: the prompt in which a model that was trained for it finds a prefix and a suffix, and goes on with the middle.

use apr_engine::About;

use crate::errors::ApiError;

/// The tokens of a vocabulary that mark where the parts of such a prompt begin.
#[derive(Debug)]
pub(crate) struct FimTokens {
    prefix: u32,
    suffix: u32,
    middle: u32,
    /// Before the name of a repository, and before that of each of its files.
    pub(crate) repository: Option<u32>,
    pub(crate) file: Option<u32>,
    /// What never is in a middle, and so ends it.
    pub(crate) ends: Vec<u32>,
}

/// What names a token: keys of a file's metadata, the newer first, then texts that vocabularies have for it.
struct Named {
    keys: &'static [&'static str],
    texts: &'static [&'static str],
}

const PREFIX: Named = Named {
    keys: &["tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id"],
    texts: &["<|fim_prefix|>", "<fim_prefix>"],
};
const SUFFIX: Named = Named {
    keys: &["tokenizer.ggml.fim_suf_token_id", "tokenizer.ggml.suffix_token_id"],
    texts: &["<|fim_suffix|>", "<fim_suffix>"],
};
const MIDDLE: Named = Named {
    keys: &["tokenizer.ggml.fim_mid_token_id", "tokenizer.ggml.middle_token_id"],
    texts: &["<|fim_middle|>", "<fim_middle>"],
};
const REPOSITORY: Named = Named { keys: &["tokenizer.ggml.fim_rep_token_id"], texts: &["<|repo_name|>", "<reponame>"] };
const FILE: Named = Named { keys: &["tokenizer.ggml.fim_sep_token_id"], texts: &["<|file_sep|>", "<file_sep>"] };
const PAD: Named = Named { keys: &["tokenizer.ggml.fim_pad_token_id"], texts: &["<|fim_pad|>", "<fim_pad>"] };

impl FimTokens {
    /// Those of the model; `param` is the field that needs them.
    ///
    /// # Errors
    /// A vocabulary that lacks one of the three.
    pub(crate) fn of(about: &About, param: &str) -> Result<FimTokens, ApiError> {
        let needed = |named: &Named| {
            named.id(about).ok_or_else(|| {
                let message = "needs a model whose vocabulary has tokens for text between two texts";
                let texts = named.texts.join(" or ");
                ApiError::unsupported(param, format_args!("{message}; expected {texts} in it, got none"))
            })
        };
        let (prefix, suffix, middle) = (needed(&PREFIX)?, needed(&SUFFIX)?, needed(&MIDDLE)?);
        let (repository, file) = (REPOSITORY.id(about), FILE.id(about));
        let ends = [prefix, suffix, middle].into_iter().chain(repository).chain(file).chain(PAD.id(about)).collect();
        Ok(FimTokens { prefix, suffix, middle, repository, file, ends })
    }

    /// The prompt of what is between `before` and `after`, whose middle begins with `begun`. `context` comes before all of it.
    pub(crate) fn prompt(&self, about: &About, context: &[u32], [before, after, begun]: [&[u32]; 3]) -> Vec<u32> {
        let bos = about.tokenizer.bos().filter(|_| about.tokenizer.add_bos());
        let mark = bos.as_slice();
        [mark, context, &[self.prefix], before, &[self.suffix], after, &[self.middle], begun].concat()
    }
}

impl Named {
    fn id(&self, about: &About) -> Option<u32> {
        let metadata = &about.file.gguf.metadata;
        let is_there = |id: &u32| (*id as usize) < about.tokenizer.n_vocab();
        let by_key = self.keys.iter().find_map(|key| metadata.u32(key).ok().flatten()).filter(is_there);
        by_key.or_else(|| self.texts.iter().find_map(|text| by_text(about, text)))
    }
}

fn by_text(about: &About, text: &str) -> Option<u32> {
    match about.tokenizer.encode_text(text, true)[..] {
        [id] => Some(id),
        _ => None,
    }
}
