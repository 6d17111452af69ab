/**
 * Technical terms that explain themselves in place. A string marks one as [token], or as [token|another word] where its
 * text differs. Each becomes a button whose explanation shows under the mouse, at keyboard focus and at a touch; Escape
 * or a touch elsewhere hides it. Screen readers get it as the button's description.
 */
import { byId, el } from './elements.js';
import { fill, t, template } from './strings.js';

/** The strings that explain the terms. */
const EXPLANATIONS = {
  parameter: 'aboutParameter', activated: 'aboutActivated', expert: 'aboutExpert', layer: 'aboutLayer', token: 'aboutToken',
  router: 'aboutRouter', weight: 'aboutWeight', affinity: 'aboutAffinity', bias: 'aboutBias', ranked: 'aboutRanked',
  group: 'aboutGroup', plays: 'aboutPlays', letIn: 'aboutLetIn', keptOut: 'aboutKeptOut', near: 'aboutNear',
  muted: 'aboutMuted', road: 'aboutRoad', common: 'aboutCommon', compare: 'aboutCompare', prompt: 'aboutPrompt',
  perSecond: 'aboutPerSecond', tierMemory: 'aboutTierMemory', tierReading: 'aboutTierReading', tierDisk: 'aboutTierDisk',
  waited: 'aboutWaited',
};
const HIDE_AFTER = 200; // milliseconds in which the pointer can go from the term to its explanation

let shown = null; // {button, box}
let hiding = 0;

/** A term with its explanation. */
export const term = (name, text) => el('button', {
  type: 'button', class: 'term', 'aria-describedby': `about-${name}`, data: { term: name },
}, text);

/** The text of `key` as nodes, its terms as buttons. Values are filled in as text and never read as marks. */
export function rich(key, values = {}) {
  return template(key).split(/(\[[^\]]+\])/).filter(Boolean).map((piece) => {
    const [, name, text] = /^\[(\w+)(?:\|([^\]]+))?\]$/.exec(piece) ?? [];
    return name ? term(name, fill(text ?? name, values)) : document.createTextNode(fill(piece, values));
  });
}

/** Writes the explanations, and every text marked with data-rich, in the page's language. */
export function explain() {
  hide();
  byId('explanations').replaceChildren(...Object.entries(EXPLANATIONS).map(([name, key]) => el('div', {
    id: `about-${name}`, role: 'tooltip', class: 'explanation', hidden: true,
  }, t(key))));
  for (const one of document.querySelectorAll('[data-rich]')) one.replaceChildren(...rich(one.dataset.rich));
  for (const one of document.querySelectorAll('[data-about]')) {
    const name = one.dataset.about;
    const button = term(name, '?');
    button.classList.add('question');
    button.setAttribute('aria-label', t('whatIs', { name: t(one.dataset.name) }));
    one.replaceChildren(button);
  }
}

const termAt = (event) => (event.target instanceof Element ? event.target.closest('.term') : null);

function show(button) {
  clearTimeout(hiding);
  if (shown?.button === button) return;
  hide();
  const box = byId(`about-${button.dataset.term}`);
  box.hidden = false;
  const at = button.getBoundingClientRect();
  const below = at.bottom + 6;
  const above = at.top - 6 - box.offsetHeight;
  box.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${below + box.offsetHeight > window.innerHeight && above > 0 ? above : below}px`;
  shown = { button, box };
}

function hide() {
  clearTimeout(hiding);
  if (shown) shown.box.hidden = true;
  shown = null;
}

function hideSoon() {
  clearTimeout(hiding);
  hiding = setTimeout(() => shown && shown.button !== document.activeElement && hide(), HIDE_AFTER);
}

/** Once, when the page starts. */
export function listenForTerms() {
  document.addEventListener('pointerover', (event) => {
    if (event.pointerType === 'touch') return;
    const button = termAt(event);
    if (button) show(button);
    else if (shown?.box.contains(event.target)) clearTimeout(hiding);
  });
  document.addEventListener('pointerout', (event) => {
    if (event.pointerType !== 'touch' && shown) hideSoon();
  });
  document.addEventListener('focusin', (event) => {
    const button = termAt(event);
    if (button) show(button);
    else hide();
  });
  document.addEventListener('focusout', (event) => { if (termAt(event)) hideSoon(); });
  document.addEventListener('click', (event) => { // a touch: not every browser focuses a touched button
    const button = termAt(event);
    if (button) show(button);
    else if (shown && !shown.box.contains(event.target)) hide();
  });
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Escape' && shown) hide();
  });
  document.addEventListener('scroll', () => { if (shown) hide(); }, { capture: true, passive: true });
  window.addEventListener('resize', hide);
}
