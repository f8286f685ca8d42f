// Appearance and language of this browser; tokens; what the daemon was told.

import * as api from '../api.js';
import { h } from '../dom.js';
import { clock, duration, number, when } from '../format.js';
import { language, LANGUAGES, t } from '../i18n.js';
import * as theme from '../theme.js';
import { attempt, button, card, choices, confirm, dialog, empty, ends, facts, field, head, note, select, table, tag } from '../ui.js';

const DAYS = [7, 30, 90, 365];
const DAY_S = 86400;

export default function settings({ who, change, load }) {
  const isAdmin = api.may(who, 'admin');
  let [data, version, tokens] = [null, null, []];

  async function create() {
    const wanted = { name: '', role: 'viewer', vm_tags: [], expires_in_s: 90 * DAY_S };
    const key = api.newKey();
    const sure = await dialog(t('tokens.create'), (finish) => h('form', { style: { padding: '0' }, onsubmit: (event) => {
      event.preventDefault();
      finish(true);
    } },
    field(t('tokens.name'), h('input', { name: 'name', required: true, maxlength: '100', autofocus: true, oninput: (event) => {
      wanted.name = event.target.value;
    } }), t('tokens.name-help')),
    field(t('tokens.role'), select(wanted.role, ['viewer', 'operator', 'admin'].map((role) => [role, t(`role.${role}`)]), (role) => {
      wanted.role = role;
    })),
    field(t('tokens.tags'), h('input', { name: 'tags', oninput: (event) => {
      wanted.vm_tags = event.target.value.split(/[\s,]+/).filter(Boolean);
    } }), t('tokens.tags-help')),
    field(t('tokens.valid'), select(String(wanted.expires_in_s), DAYS.map((n) => [String(n * DAY_S), t('vm.days', { n })]), (value) => {
      wanted.expires_in_s = Number(value);
    })),
    ends(button(t('action.back'), () => finish(null)), button(t('tokens.make'), undefined, { type: 'submit', kind: 'primary' }))));
    if (!sure) return;
    const made = await attempt(() => api.post(['tokens'], wanted, key));
    if (!made) return;
    await reveal(made);
    load();
  }

  /** Shows a secret, the only time that there is one. */
  function reveal({ token, secret }) {
    let isCopied = false;
    return dialog(t('tokens.made', { name: token.name }), (finish, draw) => [
      note('warn', t('tokens.once')),
      secret ? h('div', { class: 'secret' }, h('code', { id: 'secret' }, secret), button(isCopied ? t('tokens.copied') : t('tokens.copy'), async () => {
        await navigator.clipboard.writeText(secret);
        isCopied = true;
        draw();
      })) : note('bad', t('tokens.lost')),
      ends(button(t('tokens.stored'), () => finish(true), { kind: 'primary' }))]);
  }

  async function revoke(token) {
    if (!await confirm(t('tokens.revoke-title', { name: token.name }), t('tokens.revoke-text'), t('tokens.revoke'))) return;
    await attempt(() => api.remove(['tokens', token.id]));
    load();
  }

  function tokenTable() {
    const columns = [
      { label: t('tokens.name'), cell: (token) => [h('span', { class: 'strong' }, token.name), ' ', h('small', null, h('code', null, token.id))] },
      { label: t('tokens.role'), cell: (token) => [t(`role.${token.role}`), ' ', token.vm_tags.map((name) => [tag(name), ' '])] },
      { label: t('tokens.created'), cell: (token) => [when(token.created), ' ', h('small', null, token.created_by)] },
      { label: t('tokens.expires'), cell: (token) => when(token.expires) },
      { label: t('list.actions'), blank: true, num: true, cell: (token) => button(t('tokens.revoke'), () => revoke(token), { kind: 'quiet small danger', label: t('tokens.revoke-label', { name: token.name }) }) },
    ];
    return card(t('tokens.title'), { end: button(t('tokens.create'), create, { kind: 'small', sign: 'plus' }) }, tokens.length === 0 ? empty(t('tokens.none')) : table(columns, tokens, { label: t('tokens.title'), id: (token) => token.id }));
  }

  function appearance() {
    return card(t('settings.appearance'), { wide: 'half' }, h('div', { class: 'body stack' },
      h('div', { class: 'field' }, h('span', null, t('settings.theme')), choices(t('settings.theme'), theme.chosen(), ['auto', 'light', 'dark'].map((name) => [name, t(`theme.${name}`)]), (name) => {
        theme.choose(name || 'auto');
        change();
      })),
      field(t('settings.language'), select(language(), Object.entries(LANGUAGES), (name) => {
        localStorage.setItem('virtward-language', name);
        change();
      })),
      h('small', { class: 'soft' }, t('settings.zone', { zone: Intl.DateTimeFormat().resolvedOptions().timeZone }))));
  }

  function session() {
    return card(t('settings.session'), { wide: 'half' }, h('div', { class: 'body' }, facts(
      [t('settings.who'), who.name], [t('tokens.role'), t(`role.${who.role}`)],
      who.vm_tags.length > 0 && [t('tokens.tags'), who.vm_tags.map((name) => [tag(name), ' '])],
      [t('tokens.expires'), who.expires ? [clock(who.expires), ' · ', when(who.expires)] : '–'])));
  }

  function daemon() {
    return card(t('settings.daemon'), {}, h('div', { class: 'body' }, facts(
      [t('settings.version'), `${version.product} ${version.version} · ${version.host}`],
      [t('settings.running'), when(version.started)],
      [t('settings.config'), h('code', null, data.config_file ?? '–')],
      [t('settings.state'), h('code', null, data.state_dir)],
      [t('settings.socket'), h('code', null, data.socket)],
      [t('settings.listen'), h('code', null, data.listen ?? '–')],
      data.certificate_sha256 && [t('settings.certificate'), h('code', null, data.certificate_sha256)],
      [t('settings.connect'), h('code', null, data.connect)],
      [t('nav.repositories'), data.repositories.join(', ')],
      [t('settings.jobs-max'), number(data.jobs_max)],
      [t('settings.reconcile'), duration(data.reconcile_s)],
      [t('settings.api'), h('a', { href: '/api', target: '_blank', rel: 'noopener' }, 'OpenAPI 3.1')])));
  }

  return {
    title: () => t('nav.settings'),
    async load() {
      [data, version, tokens] = await Promise.all([api.get(['settings']), api.get(['version']), isAdmin ? api.get(['tokens']) : []]);
    },
    view: () => [
      head(t('nav.settings')),
      h('div', { class: 'stack', key: 'all' }, h('div', { class: 'grid' }, appearance(), session()), isAdmin && tokenTable(), daemon()),
    ],
  };
}
