// Log-in with a token, which becomes a session in a cookie that scripts cannot read.

import { logIn } from '../api.js';
import { h, patch } from '../dom.js';
import { mark } from '../icons.js';
import { language, LANGUAGES, t } from '../i18n.js';
import { button, field, select, trouble } from '../ui.js';

/** Shows it, and calls `enter` with who logged in. */
export function login(enter, change) {
  let [problem, isBusy] = [null, false];

  async function submit(event) {
    event.preventDefault();
    const token = event.target.elements.token.value.trim();
    if (!token || isBusy) return;
    isBusy = true;
    draw();
    try {
      await enter(await logIn(token));
      return;
    } catch (error) {
      if (error.code === undefined) throw error;
      problem = error;
    }
    isBusy = false;
    draw();
    document.getElementById('token').select();
  }

  function draw() {
    document.title = `${t('login.title')} · Virtward`;
    patch(document.getElementById('app'), [h('main', { class: 'login', id: 'main', key: 'login' }, h('div', { class: 'card' },
      h('div', { class: 'brand' }, mark(), 'Virtward'),
      h('h1', { class: 'visually-hidden' }, t('login.title')),
      h('form', { onsubmit: submit },
        // Only so that password managers know what to keep the token under.
        h('input', { name: 'username', autocomplete: 'username', value: 'virtward', readonly: true, hidden: true }),
        field(t('login.token'), h('input', { id: 'token', name: 'token', type: 'password', autocomplete: 'current-password', required: true, placeholder: 'vwt_…', spellcheck: 'false' })),
        problem && trouble(problem),
        button(isBusy ? t('login.busy') : t('login.enter'), undefined, { type: 'submit', kind: 'primary', disabled: isBusy })),
      h('div', { class: 'soft' }, t('login.help')),
      h('code', null, 'virtward token create me --role operator'),
      select(language(), Object.entries(LANGUAGES), (name) => {
        localStorage.setItem('virtward-language', name);
        change().then(draw);
      }, t('settings.language'))))]);
  }

  draw();
  document.getElementById('token').focus();
}
