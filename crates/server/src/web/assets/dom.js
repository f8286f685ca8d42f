// Elements from data. Text only ever becomes a text node, so nothing that a VM, a log or a person says is read as markup.
// `patch` makes what is shown like what was built and leaves alone what is the same: focus, selection and scrolling stay.

const SVG = 'http://www.w3.org/2000/svg';
const LIVE = new Set(['value', 'checked', 'disabled', 'selected', 'open', 'indeterminate']);

function put(element, props) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === 'key') element.key = String(value);
    else if (name === 'style') for (const [rule, to] of Object.entries(value)) element.style.setProperty(rule, to);
    else if (name.startsWith('on')) element[name] = value;
    else if (LIVE.has(name) && name in element) element[name] = value;
    else element.setAttribute(name, value === true ? '' : value);
  }
}

function fill(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === undefined || child === null || child === false || child === '') continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

/** An element: name, attributes (`on…` are handlers, `key` its identity among its siblings), children. */
export function h(name, props, ...children) {
  const element = document.createElement(name);
  // Options must be there before a value can be chosen.
  fill(element, children);
  put(element, props);
  return element;
}

/** The same for drawings. */
export function s(name, props, ...children) {
  const element = document.createElementNS(SVG, name);
  put(element, props);
  return fill(element, children);
}

const HANDLERS = ['onclick', 'oninput', 'onchange', 'onsubmit', 'onkeydown', 'onscroll', 'onclose', 'ontoggle'];

function isSame(a, b) {
  return a.nodeType === b.nodeType && a.nodeName === b.nodeName && a.key === b.key;
}

function become(old, next) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== next.data) old.data = next.data;
    return;
  }
  for (const { name } of [...old.attributes]) {
    // What a person unfolded stays unfolded.
    if (name !== 'style' && name !== 'open' && !next.hasAttribute(name)) old.removeAttribute(name);
  }
  for (const { name, value } of next.attributes) {
    if (name !== 'style' && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  if (old.style.cssText !== next.style.cssText) old.style.cssText = next.style.cssText;
  for (const name of HANDLERS) old[name] = next[name];
  patch(old, [...next.childNodes]);
  // What somebody is typing is theirs.
  if ('value' in next && old !== document.activeElement && old.value !== next.value) old.value = next.value;
  if ('checked' in next) old.checked = next.checked;
  if ('disabled' in next) old.disabled = next.disabled;
}

/** Makes the children of `parent` like `children`. */
export function patch(parent, children) {
  const next = children.flat(Infinity).filter((child) => child instanceof Node);
  const keyed = new Map();
  for (const child of parent.childNodes) if (child.key !== undefined) keyed.set(child.key, child);
  let at = parent.firstChild;
  for (const child of next) {
    const known = child.key === undefined ? at : keyed.get(child.key);
    if (known && known.parentNode === parent && isSame(known, child)) {
      if (known === at) at = at.nextSibling;
      else parent.insertBefore(known, at);
      become(known, child);
    } else {
      parent.insertBefore(child, at);
    }
  }
  while (at) {
    const after = at.nextSibling;
    at.remove();
    at = after;
  }
}
