// Light, dark, or as the system says.

const KEY = 'virtward-theme';

export const chosen = () => localStorage.getItem(KEY) ?? 'auto';

export function choose(name) {
  if (name === 'auto') localStorage.removeItem(KEY);
  else localStorage.setItem(KEY, name);
  apply();
}

export function apply() {
  const name = chosen();
  if (name === 'auto') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
}
