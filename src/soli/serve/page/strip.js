/** The tokens as a line of text, each one a choice; the arrow keys move along it. */
import { el, rove, visible } from './elements.js';
import { t } from './strings.js';

export class Strip {
  /** @param {HTMLElement} host  @param {(index: number) => void} choose */
  constructor(host, choose) {
    Object.assign(this, { host, choose, all: [], waiting: [], stop: null, sounding: null, chosen: null });
    host.replaceChildren();
    host.setAttribute('role', 'listbox');
    host.setAttribute('aria-orientation', 'horizontal');
    host.onclick = (event) => {
      const token = event.target.closest('.token');
      if (token) this.choose(this.all.indexOf(token));
    };
    host.onkeydown = (event) => this.key(event);
  }

  /** Takes a token in; it appears with the next `flush`. */
  add({ text, part }) {
    const label = visible(text);
    const special = /^<\|.*\|>$|^<｜.*｜>$/.test(label);
    const token = el('span', { class: `token ${part}${special ? ' special' : ''}`, role: 'option', tabIndex: -1, 'aria-selected': 'false' }, label);
    this.all.push(token);
    this.waiting.push(token);
  }

  /** Shows what has come; `end` is how many have been played. */
  flush(end) {
    if (this.waiting.length) {
      if (!this.stop) {
        [this.stop] = this.waiting;
        this.stop.tabIndex = 0;
      }
      this.host.append(...this.waiting);
      this.waiting = [];
    }
    const sounding = end > 0 ? this.all[Math.min(end, this.all.length) - 1] : null;
    if (sounding === this.sounding) return;
    this.sounding?.classList.remove('sounding');
    sounding?.classList.add('sounding');
    this.sounding = sounding;
    if (sounding) this.reveal(sounding);
  }

  /** Scrolls the strip, and nothing else, so that a token can be seen. */
  reveal(token) {
    const { host } = this;
    const top = token.offsetTop - host.offsetTop;
    if (top < host.scrollTop || top + token.offsetHeight > host.scrollTop + host.clientHeight) host.scrollTop = top - 8;
  }

  /** Marks the token whose road is shown; null: none. */
  mark(index) {
    this.chosen?.setAttribute('aria-selected', 'false');
    this.chosen = index === null ? null : this.all[index];
    if (!this.chosen) return;
    this.chosen.setAttribute('aria-selected', 'true');
    if (this.stop) rove([this.stop, this.chosen], this.chosen);
    this.stop = this.chosen;
    this.reveal(this.chosen);
  }

  key(event) {
    const at = this.all.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: this.all.length - 1 }[event.key];
    if (event.key === 'Escape') this.choose(null);
    else if (at >= 0 && (event.key === 'Enter' || event.key === ' ')) this.choose(at);
    else if (to !== undefined && this.all[to]) {
      this.all[to].focus();
      this.choose(to);
    } else return;
    event.preventDefault();
  }

  rename() { this.host.setAttribute('aria-label', t('tokens')); }
}

/** A token's name for sentences: its text in quotation marks, spaces shown. */
export const quoted = (text) => `“${visible(text)}”`;
