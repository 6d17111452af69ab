/**
 * The simple view and the detailed one. The choice of the detailed one is the only thing that the page stores in the
 * browser; where nothing can be stored it lasts as long as the page.
 */
const NAME = 'soli.view';

const stored = () => {
  try {
    return localStorage.getItem(NAME);
  } catch {
    return null;
  }
};

let view = stored() === 'detailed' ? 'detailed' : 'simple';

/** "simple" or "detailed". */
export const currentView = () => view;

/** Shows a view; what belongs to the detailed one alone has the class "detail". */
export function showView(name) {
  view = name;
  document.body.classList.toggle('simple', view === 'simple');
}

/** The next visit begins with this view. */
export function rememberView() {
  try {
    if (view === 'detailed') localStorage.setItem(NAME, view);
    else localStorage.removeItem(NAME);
  } catch {
    // a browser that stores nothing for this page
  }
}
