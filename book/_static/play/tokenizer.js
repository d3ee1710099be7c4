"use strict";
// Byte-level BPE, as in tokenizer.json: text → words → bytes → tokens, merging the
// earliest learnt pair first.

/**
 * Qwen2's rule for words, with Unicode's white space as the rule means it (JavaScript's
 * \s is another set).
 */
const WORDS = new RegExp(
  [
    "'(?:[sSſ]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])",
    "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+",
    "\\p{N}",
    " ?[^\\p{White_Space}\\p{L}\\p{N}]+[\\r\\n]*",
    "\\p{White_Space}*[\\r\\n]+",
    "\\p{White_Space}+(?!\\P{White_Space})",
    "\\p{White_Space}+",
  ].join("|"),
  "gu",
);

/** Each byte as a printable character, the way GPT-2 wrote its vocabulary down. */
const BYTE_CHARACTERS = (() => {
  const characters = [];
  let spare = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    characters.push(String.fromCharCode(printable ? byte : spare++));
  }
  return characters;
})();

class NanoTokenizer {
  /**
   * vocabulary: tokens in the order of their ids, the first one `<|endoftext|>`.
   * merges: pairs in the order learnt.
   */
  constructor({ vocabulary, merges }) {
    this.vocabulary = vocabulary;
    this.ids = new Map(vocabulary.map((token, id) => [token, id]));
    this.ranks = new Map(merges.map((pair, rank) => [pair.join(" "), rank]));
    this.bytes = new Map(BYTE_CHARACTERS.map((character, byte) => [character, byte]));
    this.known = new Map();
  }

  encode(text) {
    const end = this.vocabulary[0];
    const encoder = new TextEncoder();
    return text.split(end).flatMap((part, index) => {
      const words = part.normalize("NFC").match(WORDS) ?? [];
      const ids = words.flatMap((word) =>
        this.word([...encoder.encode(word)].map((b) => BYTE_CHARACTERS[b]).join("")),
      );
      return index ? [0, ...ids] : ids;
    });
  }

  /** The tokens of one word. */
  word(word) {
    if (this.known.has(word)) return this.known.get(word);
    const parts = [...word];
    for (;;) {
      let best = Infinity;
      let at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) break;
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
    const ids = parts.map((part) => this.ids.get(part));
    this.known.set(word, ids);
    return ids;
  }

  /**
   * The bytes of tokens; `<|endoftext|>` has none. A character may be cut between two
   * tokens.
   */
  toBytes(ids) {
    return Uint8Array.from(
      ids.flatMap((id) =>
        id ? [...this.vocabulary[id]].map((c) => this.bytes.get(c)) : [],
      ),
    );
  }

  decode(ids) {
    return new TextDecoder().decode(this.toBytes(ids));
  }
}
