// Texts: one dictionary per language. `{name}` is replaced; `{n|one|many}` chooses by number.

export const LANGUAGES = { en: 'English', 'zh-TW': '繁體中文' };

let words = {};
let current = 'en';

/** The language to begin with. */
export function preferred() {
  const stored = localStorage.getItem('virtward-language');
  if (stored in LANGUAGES) return stored;
  return navigator.language.startsWith('zh') ? 'zh-TW' : 'en';
}

/** Loads a dictionary. */
export async function use(name) {
  const response = await fetch(new URL(`./lang/${name}.json`, import.meta.url));
  words = await response.json();
  current = name;
  document.documentElement.lang = name;
}

export const language = () => current;

/** The text of a key; the key itself shows that it is missing. */
export function t(key, values = {}) {
  const text = words[key] ?? key;
  return text.replace(/\{(\w+)(?:\|([^|}]*)\|([^}]*))?\}/g, (_, name, one, many) => {
    if (one !== undefined) return values[name] === 1 ? one : many;
    return values[name] ?? '';
  });
}

/** The text of a key if there is one, else what came from the daemon. */
export const word = (key, otherwise) => words[key] ?? otherwise;
