/** Making DOM elements. Text always becomes a text node: nothing here, or anywhere on the page, parses HTML. */

/**
 * @param {string} name  tag
 * @param {Record<string, unknown>} [properties]  `class`, `data`, `onEvent` listeners, `aria-…`/`role` attributes, else properties
 * @param {...(Node|string|number|null)} children
 */
export function el(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (key === 'class') element.className = value;
    else if (key === 'data') Object.assign(element.dataset, value);
    else if (key.startsWith('on')) element.addEventListener(key.slice(2).toLowerCase(), value);
    else if (key.includes('-') || ['role', 'scope', 'colspan', 'for', 'lang'].includes(key)) element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children.filter((child) => child !== null).map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

/** The element with this id; the page always has it. */
export const byId = (id) => document.getElementById(id);

const SPACES = { ' ': '·', '\n': '↵', '\t': '⇥' };

/** A token's text with its spaces shown and control or direction-changing characters as ⟨hex⟩. */
export const visible = (text) => harmless(text.replace(/[ \n\t]/g, (character) => SPACES[character]));

/** Text in which nothing can hide: control and direction-changing characters as ⟨hex⟩. */
export function harmless(text) {
  return text
    .replace(/[\u0000-\u001f\u007f-\u009f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g,
      (character) => `⟨${character.charCodeAt(0).toString(16).padStart(2, '0')}⟩`);
}

/** Moves the one tab stop of a row of controls (roving tabindex) to `chosen`. */
export function rove(all, chosen) {
  for (const one of all) one.tabIndex = one === chosen ? 0 : -1;
}
