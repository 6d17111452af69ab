/**
 * Whether the server is there: it is asked every few seconds while the page is visible, and what is wrong is said in a
 * sentence with a button that tries again. When the server is back, the page goes on by itself.
 */
import { getHealth } from './api.js';
import { byId } from './elements.js';
import { t } from './strings.js';

const EVERY = 3000; // milliseconds between two questions
export const SLOW_AFTER = 5000; // milliseconds without an answer

/** The sentence above the page; `retry` null: without a button. */
export class Notice {
  constructor() {
    Object.assign(this, { kind: null, retry: null }); // the string it shows, and what the button does
    byId('retry').onclick = () => {
      const { retry } = this;
      this.hide();
      retry?.();
    };
  }

  show(kind, values = {}, retry = null) {
    Object.assign(this, { kind, values, retry });
    byId('alert').textContent = t(kind, values);
    byId('alert').hidden = false;
    byId('retry').hidden = retry === null;
    byId('notice').hidden = false;
  }

  /** Hides the sentence, or only one of these kinds. */
  hide(...kinds) {
    if (kinds.length && !kinds.includes(this.kind)) return;
    Object.assign(this, { kind: null, retry: null });
    byId('alert').textContent = '';
    byId('alert').hidden = true;
    byId('retry').hidden = true;
    byId('notice').hidden = true;
  }

  /** Says the same in the page's language. */
  translate() { if (this.kind) this.show(this.kind, this.values, this.retry); }
}

/** Watches the server; states are "ready", "loading", "slow" and "gone". */
export class Watch {
  /** @param {(state: string) => void} changed */
  constructor(changed) {
    Object.assign(this, { changed, state: 'ready', timer: 0, asking: false });
    document.addEventListener('visibilitychange', () => { if (!document.hidden) this.ask(); });
    this.later();
  }

  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => (document.hidden ? this.later() : this.ask()), EVERY);
  }

  /** Asks now. */
  async ask() {
    if (this.asking) return;
    this.asking = true;
    this.report(await getHealth(SLOW_AFTER));
    this.asking = false;
    this.later();
  }

  report(state) {
    const isNew = state !== this.state;
    this.state = state;
    if (isNew) this.changed(state);
  }
}
